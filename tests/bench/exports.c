/* A vfio-user server in C that does as little as one can: the peer of exports.
 *
 *   exports LISTENING_FD     one client at a time; VERSION, DMA_MAP (mmap), DMA_UNMAP (munmap), REGION_READ and
 *                            REGION_WRITE of one region of 1 MiB of memory, by the width that was asked for
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

struct header { uint16_t id, command; uint32_t size, flags, error; };
struct access { uint64_t offset; uint32_t region, count; uint8_t data[8]; };
struct map { uint32_t argsz, flags; uint64_t offset, address, size; };
struct unmap { uint32_t argsz, flags; uint64_t address, size; };

#define REGION (1 << 20)
#define MAPS 1024

static uint8_t *region;
static struct { uint64_t address, size; void *at; } maps[MAPS];

static int touch(struct access *a, int write)
{
    volatile uint8_t *at = region + a->offset;

    if (a->region != 2 || a->offset > REGION - 8 || a->offset % a->count)
        return EINVAL;
    switch (a->count) {
    case 1: if (write) *at = *a->data; else *a->data = *at; return 0;
    case 2: if (write) *(volatile uint16_t *)at = *(uint16_t *)a->data; else *(uint16_t *)a->data = *(volatile uint16_t *)at; return 0;
    case 4: if (write) *(volatile uint32_t *)at = *(uint32_t *)a->data; else *(uint32_t *)a->data = *(volatile uint32_t *)at; return 0;
    case 8: if (write) *(volatile uint64_t *)at = *(uint64_t *)a->data; else *(uint64_t *)a->data = *(volatile uint64_t *)at; return 0;
    }
    return EINVAL;
}

static int map(const struct map *m, int fd)
{
    for (int i = 0; i < MAPS; i++)
        if (!maps[i].size) {
            void *at = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, m->offset);

            if (at == MAP_FAILED)
                return errno;
            maps[i].address = m->address, maps[i].size = m->size, maps[i].at = at;
            return 0;
        }
    return ENOSPC;
}

static int unmap(const struct unmap *u)
{
    for (int i = 0; i < MAPS; i++)
        if (maps[i].size && maps[i].address == u->address && maps[i].size == u->size) {
            munmap(maps[i].at, maps[i].size);
            maps[i].size = 0;
            return 0;
        }
    return ENOENT;
}

static int serve(int client)
{
    static uint8_t buffer[65536];
    char control[CMSG_SPACE(16 * sizeof(int))];
    struct iovec vector = { buffer, sizeof(buffer) };
    struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control) };
    ssize_t got = recvmsg(client, &message, MSG_CMSG_CLOEXEC);
    struct header *h = (struct header *)buffer;
    struct access *a = (struct access *)(h + 1);
    int fd = -1, error = 0;
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);

    if (got < (ssize_t)sizeof(*h) || h->size != (uint32_t)got)
        return -1;
    if (c)
        memcpy(&fd, CMSG_DATA(c), sizeof(fd));
    switch (h->command) {
    case 1: break;
    case 2: error = map((struct map *)(h + 1), fd); h->size = sizeof(*h); break;
    case 3: error = unmap((struct unmap *)(h + 1)); break;
    case 9: error = touch(a, 0); h->size = 32 + a->count; break;
    case 10: error = touch(a, 1); h->size = 32; break;
    default: error = EINVAL;
    }
    if (fd >= 0)
        close(fd);
    h->flags = 1;
    if (error)
        h->flags = 0x21, h->error = error, h->size = sizeof(*h);
    return send(client, buffer, h->size, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

int main(int argc, char **argv)
{
    int listener = atoi(argv[argc - 1]), epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = { .events = EPOLLIN, .data.fd = listener };

    region = mmap(NULL, REGION, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    while (epoll_wait(epoll, &event, 1, -1) == 1) {
        int fd = event.data.fd;

        if (fd == listener) {
            struct epoll_event new = { .events = EPOLLIN, .data.fd = accept(listener, NULL, NULL) };

            epoll_ctl(epoll, EPOLL_CTL_ADD, new.data.fd, &new);
        } else if (serve(fd))
            close(fd);
    }
    return errno != EINTR;
}
