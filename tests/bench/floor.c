/* What the kernel alone costs: the floor under the round trip and under the relay.
 *
 *   floor echo LISTENING_FD     accepts, and answers whatever arrives with one prepared line
 *   floor relay IN_FD OUT_FD    epoll on one eventfd; each time it is signalled, signals the other
 *   floor level IN OUT EOI UNMASK   the same, and back: each time EOI is signalled, signals UNMASK
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static const char REPLY[] =
    "{\"return\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"floor\"}}\r\n";

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void watch(int epoll, int fd)
{
    struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
}

static int echo(int epoll, int listener)
{
    static char buffer[65536];
    struct epoll_event event;

    watch(epoll, listener);
    while (epoll_wait(epoll, &event, 1, -1) == 1) {
        int fd = event.data.fd;

        if (fd == listener) {
            int client = accept(listener, NULL, NULL);

            if (client >= 0)
                watch(epoll, client);
            continue;
        }
        if (recv(fd, buffer, sizeof(buffer), 0) <= 0)
            close(fd);
        else if (send(fd, REPLY, sizeof(REPLY) - 1, MSG_NOSIGNAL) < 0)
            close(fd);
    }
    return errno != EINTR;
}

static int relay(int epoll, int in, int out)
{
    struct epoll_event event;
    uint64_t count;

    watch(epoll, in);
    while (epoll_wait(epoll, &event, 1, -1) == 1) {
        if (read(in, &count, sizeof(count)) != sizeof(count))
            continue;
        count = 1;
        if (write(out, &count, sizeof(count)) != sizeof(count))
            die("write");
    }
    return errno != EINTR;
}

static void pass_on(int in, int out)
{
    uint64_t count;

    if (read(in, &count, sizeof(count)) != sizeof(count))
        return;
    count = 1;
    if (write(out, &count, sizeof(count)) != sizeof(count))
        die("write");
}

static int level(int epoll, int in, int out, int eoi, int unmask)
{
    struct epoll_event event;

    watch(epoll, in);
    watch(epoll, eoi);
    while (epoll_wait(epoll, &event, 1, -1) == 1) {
        if (event.data.fd == in)
            pass_on(in, out);
        else
            pass_on(eoi, unmask);
    }
    return errno != EINTR;
}

int main(int argc, char **argv)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);

    if (epoll < 0)
        die("epoll_create1");
    if (argc == 3 && !strcmp(argv[1], "echo"))
        return echo(epoll, atoi(argv[2]));
    if (argc == 4 && !strcmp(argv[1], "relay"))
        return relay(epoll, atoi(argv[2]), atoi(argv[3]));
    if (argc == 6 && !strcmp(argv[1], "level"))
        return level(epoll, atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
    fprintf(stderr, "usage: floor echo FD | floor relay IN OUT | floor level IN OUT EOI UNMASK\n");
    return 2;
}
