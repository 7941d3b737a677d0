/* What the kernel's VFIO alone costs: the same ioctls that vfiod makes, by a program that does nothing else.
 *
 *   kernel group ADDRESS GROUP     takes the device by its group and a container of its own
 *   kernel cdev ADDRESS PATH       takes it by its cdev, with an iommufd and an IOAS of its own
 *
 * Then it answers commands, one per line, with nanoseconds, a line each:
 *
 *   open              from nothing to a device whose registers, regions and interrupts are known, REQ armed; then closed
 *   map SIZE COUNT    COUNT pieces of SIZE bytes mapped one by one, and unmapped: two numbers, per piece
 *   config COUNT      reading 4 bytes of configuration space, per read
 *   vectors COUNT     an eventfd each for COUNT MSI-X vectors in one SET_IRQS, and disabled
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* <linux/iommufd.h> and the newer part of <linux/vfio.h>, which the build machine's headers may not have. */
struct bind { uint32_t argsz, flags; int32_t iommufd; uint32_t devid; };
struct attach { uint32_t argsz, flags, pt; };
struct ioas_alloc { uint32_t size, flags, id; };
struct ioas_map_file {
    uint32_t size, flags, id; int32_t fd; uint64_t start, length, iova;
};
struct ioas_unmap { uint32_t size, id; uint64_t iova, length; };
#define DEVICE_BIND _IO(';', 100 + 18)
#define DEVICE_ATTACH _IO(';', 100 + 19)
#define IOAS_ALLOC _IO(';', 0x81)
#define IOAS_UNMAP _IO(';', 0x86)
#define IOAS_MAP_FILE _IO(';', 0x8f)

static const char *address, *place;
static int by_group, container = -1, group = -1, device = -1, memory = -1, req = -1;
static uint32_t ioas;
static char *pages;
static uint64_t mapped, config_at;

static void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int opened(const char *path)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);

    if (fd < 0)
        die(path);
    return fd;
}

static void set_irq(int index, int count, const int *fds)
{
    struct vfio_irq_set *set = calloc(1, sizeof(*set) + count * sizeof(int));

    set->argsz = sizeof(*set) + count * sizeof(int);
    set->flags = VFIO_IRQ_SET_ACTION_TRIGGER | (count ? VFIO_IRQ_SET_DATA_EVENTFD : VFIO_IRQ_SET_DATA_NONE);
    set->index = index;
    set->count = count;
    memcpy(set->data, fds, count * sizeof(int));
    if (ioctl(device, VFIO_DEVICE_SET_IRQS, set))
        die("VFIO_DEVICE_SET_IRQS");
    free(set);
}

static void take(void)
{
    if (by_group) {
        struct vfio_group_status status = { .argsz = sizeof(status) };

        container = opened("/dev/vfio/vfio");
        group = opened(place);
        if (ioctl(container, VFIO_GET_API_VERSION) || ioctl(group, VFIO_GROUP_GET_STATUS, &status) ||
            ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) || ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU))
            die("group");
        device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address);
        if (device < 0)
            die("VFIO_GROUP_GET_DEVICE_FD");
    } else {
        struct bind bind = { .argsz = sizeof(bind) };
        struct ioas_alloc alloc = { .size = sizeof(alloc) };
        struct attach attach = { .argsz = sizeof(attach) };

        container = opened("/dev/iommu");
        device = opened(place);
        bind.iommufd = container;
        if (ioctl(device, DEVICE_BIND, &bind) || ioctl(container, IOAS_ALLOC, &alloc))
            die("cdev");
        attach.pt = ioas = alloc.id;
        if (ioctl(device, DEVICE_ATTACH, &attach))
            die("VFIO_DEVICE_ATTACH_IOMMUFD_PT");
    }
}

static void learn(void)
{
    struct vfio_device_info info = { .argsz = sizeof(info) };
    char config[4096];

    if (ioctl(device, VFIO_DEVICE_GET_INFO, &info))
        die("VFIO_DEVICE_GET_INFO");
    for (uint32_t i = 0; i < info.num_regions; i++) {
        char room[1024] = { 0 };
        struct vfio_region_info *region = (void *)room;

        region->argsz = sizeof(room);
        region->index = i;
        if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, region))
            continue; /* VGA on a device that has none: EINVAL */
        if (i == VFIO_PCI_CONFIG_REGION_INDEX) {
            config_at = region->offset;
            if (pread(device, config, region->size, region->offset) < 256)
                die("config");
        }
    }
    for (uint32_t i = 0; i < info.num_irqs; i++) {
        struct vfio_irq_info irq = { .argsz = sizeof(irq), .index = i };

        ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &irq); /* ERR on a device without it: EINVAL */
    }
    req = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    set_irq(VFIO_PCI_REQ_IRQ_INDEX, 1, &req);
}

static void let_go(void)
{
    set_irq(VFIO_PCI_REQ_IRQ_INDEX, 0, NULL);
    close(req);
    close(device);
    if (by_group)
        close(group);
    close(container);
}

static void need_memory(uint64_t size)
{
    if (size <= mapped)
        return;
    if (memory < 0)
        memory = memfd_create("guest", MFD_CLOEXEC);
    if (mapped)
        munmap(pages, mapped);
    if (ftruncate(memory, size))
        die("ftruncate");
    pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (pages == MAP_FAILED)
        die("mmap");
    for (uint64_t at = 0; at < size; at += 4096)
        pages[at] = 1;
    mapped = size;
}

static void map(uint64_t size, int count)
{
    uint64_t start, middle;
    int failed = 0;

    /* Every piece is the same memory, at another IOVA: as in vfiod's half of the comparison. */
    need_memory(size);
    start = now();
    for (int i = 0; i < count; i++) {
        if (by_group) {
            struct vfio_iommu_type1_dma_map m = {
                .argsz = sizeof(m), .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
                .vaddr = (uint64_t)pages, .iova = (uint64_t)i * size, .size = size,
            };
            failed |= ioctl(container, VFIO_IOMMU_MAP_DMA, &m);
        } else {
            struct ioas_map_file m = {
                .size = sizeof(m), .flags = 7, .id = ioas, .fd = memory,
                .length = size, .iova = (uint64_t)i * size,
            };
            failed |= ioctl(container, IOAS_MAP_FILE, &m);
        }
    }
    middle = now();
    if (failed)
        die("map");
    for (int i = 0; i < count; i++) {
        if (by_group) {
            struct vfio_iommu_type1_dma_unmap m = { .argsz = sizeof(m), .iova = (uint64_t)i * size, .size = size };

            failed |= ioctl(container, VFIO_IOMMU_UNMAP_DMA, &m);
        } else {
            struct ioas_unmap m = { .size = sizeof(m), .id = ioas, .iova = (uint64_t)i * size, .length = size };

            failed |= ioctl(container, IOAS_UNMAP, &m);
        }
    }
    if (failed)
        die("unmap");
    printf("%llu %llu\n", (unsigned long long)(middle - start) / count, (unsigned long long)(now() - middle) / count);
}

int main(int argc, char **argv)
{
    char line[128];

    if (argc != 4)
        return 2;
    by_group = !strcmp(argv[1], "group");
    address = argv[2];
    place = argv[3];
    setvbuf(stdout, NULL, _IOLBF, 0);
    take();
    learn();
    puts("ready");
    while (fgets(line, sizeof(line), stdin)) {
        unsigned long long size;
        int count;
        uint64_t start;

        if (!strncmp(line, "open", 4)) {
            let_go();
            start = now();
            take();
            learn();
            printf("%llu\n", (unsigned long long)(now() - start));
        } else if (sscanf(line, "map %llu %d", &size, &count) == 2) {
            map(size, count);
        } else if (sscanf(line, "config %d", &count) == 1) {
            uint32_t word;

            start = now();
            for (int i = 0; i < count; i++)
                if (pread(device, &word, 4, config_at) != 4)
                    die("pread");
            printf("%llu\n", (unsigned long long)(now() - start) / count);
        } else if (sscanf(line, "vectors %d", &count) == 1) {
            int *fds = calloc(count, sizeof(int));

            for (int i = 0; i < count; i++)
                fds[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
            start = now();
            set_irq(VFIO_PCI_MSIX_IRQ_INDEX, count, fds);
            printf("%llu\n", (unsigned long long)(now() - start));
            set_irq(VFIO_PCI_MSIX_IRQ_INDEX, 0, NULL);
            for (int i = 0; i < count; i++)
                close(fds[i]);
            free(fds);
        } else {
            return 2;
        }
    }
    return 0;
}
