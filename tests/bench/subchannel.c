/*
 * What a channel program costs by plain system calls: pwrite of the I/O region, poll of the eventfd, its read,
 * pread of the region. The peer of subchannel.py.
 *
 *   subchannel GROUP UUID    then, for each line "N" on standard input: N NOPs, and a line with ns per program
 */
#include <fcntl.h>
#include <linux/vfio.h>
#include <linux/vfio_ccw.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define IOVA 0x100000
#define SIZE 0x10000

static int check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
	char path[64], line[64];

	if (argc != 3)
		return 2;
	snprintf(path, sizeof(path), "/dev/vfio/%s", argv[1]);
	int container = check(open("/dev/vfio/vfio", O_RDWR), "container");
	int group = check(open(path, O_RDWR), path);
	check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "VFIO_GROUP_SET_CONTAINER");
	check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");
	uint32_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map), .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)memory, .iova = IOVA, .size = SIZE,
	};
	check(ioctl(container, VFIO_IOMMU_MAP_DMA, &map), "VFIO_IOMMU_MAP_DMA");
	int device = check(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, argv[2]), "VFIO_GROUP_GET_DEVICE_FD");
	struct vfio_region_info region = { .argsz = sizeof(region), .index = VFIO_CCW_CONFIG_REGION_INDEX };
	check(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &region), "VFIO_DEVICE_GET_REGION_INFO");
	int event = check(eventfd(0, EFD_CLOEXEC), "eventfd");
	struct {
		struct vfio_irq_set set;
		int fd;
	} irq = { { sizeof(irq), VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_CCW_IO_IRQ_INDEX, 0, 1 },
		  event };
	check(ioctl(device, VFIO_DEVICE_SET_IRQS, &irq), "VFIO_DEVICE_SET_IRQS");

	memory[0] = 0x03200001; /* NOP, suppress incorrect length, count 1; this machine is big-endian */
	memory[1] = IOVA;
	uint32_t orb[3] = { 0, 0x00c0ff00, IOVA }; /* format 1, prefetch, every path */
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		int count = atoi(line);
		long long start = now();

		for (int i = 0; i < count; i++) {
			struct ccw_io_region io = { 0 };
			struct pollfd wait = { event, POLLIN, 0 };
			uint64_t fired;

			memcpy(io.orb_area, orb, sizeof(orb));
			io.scsw_area[2] = 0x40; /* the start function */
			check(pwrite(device, &io, sizeof(io), region.offset), "pwrite");
			check(poll(&wait, 1, 60000), "poll");
			check(read(event, &fired, sizeof(fired)), "read");
			check(pread(device, &io, sizeof(io), region.offset), "pread");
			if (io.irb_area[8] != 0x0c) /* channel end, device end */
				return fprintf(stderr, "device status %02x\n", io.irb_area[8]), 1;
		}
		printf("%lld\n", (now() - start) / count);
		fflush(stdout);
	}
	return 0;
}
