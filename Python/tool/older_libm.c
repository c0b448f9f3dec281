/// `hypot` of glibc 2.35 differs from those before only in how it reports errors: the command takes the first one, so that it
/// starts with glibc 2.34.
__asm__(".symver first_hypot, hypot@GLIBC_2.2.5");
__asm__(".symver first_hypotf, hypotf@GLIBC_2.2.5");

double first_hypot(double x, double y);
float first_hypotf(float x, float y);

double hypot(double x, double y) { return first_hypot(x, y); }
float hypotf(float x, float y) { return first_hypotf(x, y); }
