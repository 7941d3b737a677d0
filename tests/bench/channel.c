/* The peer of ccw-request: the same write, poll and read, in C, with a thread for the device.
 *
 *   channel N      N round trips: pwrite of the I/O region, the device's thread is woken and writes the IRB, poll of
 *                     the eventfd, its counter read, pread of the region. Prints the median in ns.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define REGION 124
static int region, started, ended;

static void *device(void *unused)
{
    static const uint8_t irb[96] = { 0x00, 0xc0, 0x40, 0x07, 0, 0, 0x10, 0x08, 0x0c };
    uint64_t count;

    (void)unused;
    while (read(started, &count, 8) == 8)
        if (pwrite(region, irb, sizeof irb, 24) != sizeof irb || write(ended, &(uint64_t){ 1 }, 8) != 8)
            abort();
    return NULL;
}

static int by_size(const void *one, const void *other)
{
    int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a > b) - (a < b);
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 1000;
    int64_t *times = calloc(rounds > 0 ? rounds : 1, sizeof *times);
    uint8_t request[REGION] = { 0 }, reply[REGION];
    struct pollfd waiting;
    pthread_t thread;

    region = memfd_create("region", MFD_CLOEXEC);
    started = eventfd(0, EFD_CLOEXEC);
    ended = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!times || rounds < 1 || region < 0 || started < 0 || ended < 0 || pthread_create(&thread, NULL, device, NULL))
        return 1;
    waiting = (struct pollfd){ .fd = ended, .events = POLLIN };
    for (int round = 0; round < rounds; round++) {
        struct timespec a, b;
        uint64_t count;

        clock_gettime(CLOCK_MONOTONIC, &a);
        if (pwrite(region, request, REGION, 0) != REGION || write(started, &(uint64_t){ 1 }, 8) != 8)
            return 1;
        if (poll(&waiting, 1, -1) != 1 || read(ended, &count, 8) != 8 || pread(region, reply, REGION, 0) != REGION)
            return 1;
        clock_gettime(CLOCK_MONOTONIC, &b);
        if (reply[24 + 8] != 0x0c)
            return 1;
        times[round] = (b.tv_sec - a.tv_sec) * 1000000000LL + (b.tv_nsec - a.tv_nsec);
    }
    qsort(times, rounds, sizeof *times, by_size);
    printf("%lld\n", (long long)times[rounds / 2]);
    return 0;
}
