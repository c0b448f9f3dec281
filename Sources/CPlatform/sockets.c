#define _GNU_SOURCE
#include "CPlatform.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static socklen_t abstract_address(struct sockaddr_un *address, const char *name) {
  size_t length = strlen(name);
  if (length > sizeof address->sun_path - 1) length = sizeof address->sun_path - 1;
  memset(address, 0, sizeof *address);
  address->sun_family = AF_UNIX;
  memcpy(address->sun_path + 1, name, length);
  return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
}

static int abstract_socket(void) { return socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }

/// Closes what a failed step leaves, keeping that step's errno.
static int give_up(int descriptor) {
  int code = errno;
  close(descriptor);
  errno = code;
  return -1;
}

int swiftep_listen_abstract(const char *name) {
  struct sockaddr_un address;
  socklen_t length = abstract_address(&address, name);
  int descriptor = abstract_socket();
  if (descriptor < 0) return -1;
  if (bind(descriptor, (struct sockaddr *)&address, length) < 0) return give_up(descriptor);
  if (listen(descriptor, SOMAXCONN) < 0) return give_up(descriptor);
  return descriptor;
}

int swiftep_connect_abstract(const char *name) {
  struct sockaddr_un address;
  socklen_t length = abstract_address(&address, name);
  int descriptor = abstract_socket();
  if (descriptor < 0) return -1;
  if (connect(descriptor, (struct sockaddr *)&address, length) < 0) return give_up(descriptor);
  return descriptor;
}

int swiftep_accept(int listener) { return accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK); }

int swiftep_peer_user(int descriptor, uint32_t *user) {
  struct ucred credentials;
  socklen_t length = sizeof credentials;
  if (getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &credentials, &length) < 0) return -1;
  *user = credentials.uid;
  return 0;
}

ssize_t swiftep_send(int descriptor, const void *bytes, size_t byte_count, int attachment) {
  struct iovec part = {.iov_base = (void *)bytes, .iov_len = byte_count};
  union {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(int))];
  } control;
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  if (attachment >= 0) {
    memset(&control, 0, sizeof control);
    message.msg_control = &control;
    message.msg_controllen = sizeof control.space;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &attachment, sizeof(int));
  }
  return sendmsg(descriptor, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ssize_t swiftep_receive(int descriptor, void *bytes, size_t capacity, int *attachment, bool *is_cut) {
  struct iovec part = {.iov_base = bytes, .iov_len = capacity};
  union {
    struct cmsghdr header;
    char space[CMSG_SPACE(8 * sizeof(int))];
  } control;
  struct msghdr message = {
      .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.space};
  *attachment = -1;
  ssize_t received = recvmsg(descriptor, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (received < 0) return received;
  *is_cut = (message.msg_flags & MSG_TRUNC) != 0;
  for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header != NULL; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t index = 0; index < count; index++) {
      int found;
      memcpy(&found, CMSG_DATA(header) + index * sizeof(int), sizeof(int));
      // A message carries one; what else a peer sends is not kept.
      if (*attachment < 0) *attachment = found;
      else close(found);
    }
  }
  return received;
}

int swiftep_make_waker(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }

int swiftep_random(void *bytes, size_t byte_count) { return getrandom(bytes, byte_count, 0) == (ssize_t)byte_count ? 0 : -1; }

int swiftep_seals_shrinking(int descriptor) {
  int seals = fcntl(descriptor, F_GET_SEALS);
  return seals < 0 ? -1 : (seals & F_SEAL_SHRINK) != 0;
}
