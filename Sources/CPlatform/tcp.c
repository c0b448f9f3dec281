#define _GNU_SOURCE
#include "CPlatform.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

static int give_up(int descriptor) {
  int code = errno;
  close(descriptor);
  errno = code;
  return -1;
}

static int tcp_socket(const struct sockaddr *address) {
  int descriptor = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (descriptor < 0) return -1;
  int on = 1;
  // An address can be bound while connections of an earlier listener still fade away. Both ends set it: on one host, a
  // connecting socket may have had the listener's port for its own.
  if (setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0) return give_up(descriptor);
  if (setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0) return give_up(descriptor);
  return descriptor;
}

int swiftep_listen_tcp(const struct sockaddr *address, socklen_t length) {
  int descriptor = tcp_socket(address);
  if (descriptor < 0) return -1;
  if (bind(descriptor, address, length) < 0 || listen(descriptor, SOMAXCONN) < 0) return give_up(descriptor);
  return descriptor;
}

int swiftep_connect_tcp(const struct sockaddr *address, socklen_t length) {
  int descriptor = tcp_socket(address);
  if (descriptor < 0) return -1;
  if (connect(descriptor, address, length) < 0 && errno != EINPROGRESS) return give_up(descriptor);
  return descriptor;
}

int swiftep_connection_error(int descriptor) {
  int code = 0;
  socklen_t length = sizeof code;
  return getsockopt(descriptor, SOL_SOCKET, SO_ERROR, &code, &length) < 0 ? errno : code;
}
