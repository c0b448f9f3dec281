/// Functions that the command would take a newer version of than others have: it takes the first one, so that it starts with
/// glibc 2.34 and GCC 11's libstdc++. The versions differ in how they report errors, and where a thread can be cancelled.
__asm__(".symver first_hypot, hypot@GLIBC_2.2.5");
__asm__(".symver first_hypotf, hypotf@GLIBC_2.2.5");
__asm__(".symver first_wait, _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");

double first_hypot(double x, double y);
float first_hypotf(float x, float y);
void first_wait(void *condition, void *lock);

double hypot(double x, double y) { return first_hypot(x, y); }
float hypotf(float x, float y) { return first_hypotf(x, y); }

/// `std::condition_variable::wait`.
void wait(void *condition, void *lock) __asm__("_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE");
void wait(void *condition, void *lock) { first_wait(condition, lock); }
