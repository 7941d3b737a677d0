/*
 * The only program of a small Linux guest: it looks for one PCI device that a hypervisor passed on, and uses it as a
 * driver would, from inside. Registers and memory by sysfs; interrupts and DMA by vfio-pci without an IOMMU, which the
 * small guest does not have. One line on the console for each thing seen:
 *
 *     vfiod-guest: ok NAME DETAIL        vfiod-guest: FAILED NAME DETAIL
 *
 * and at the end "vfiod-guest: done N", N failures. Kernel command line:
 *
 *     vfiod.then=poweroff | reboot | wait    what follows
 *     vfiod.rounds=N                         N times: wait for the device to come, use it, wait for it to go
 *     vfiod.serial=N                         the device is a serial card of N ports, and the kernel's 8250 drives it: each
 *                                            port says "port P of N", gives back every line with upper and lower case
 *                                            exchanged, and is done after the line "end"
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>
#include <linux/vfio.h>

enum { PAGE = 4096, CONFIG_COMMAND = 4, COMMAND_MEMORY = 2, COMMAND_MASTER = 4, WAIT_MS = 60000 };

struct model {
    uint32_t id; /* device << 16 | vendor */
    const char *name;
    uint32_t identity, inverting, raise, acknowledge;
};

static const struct model models[] = {
    {0x11e81234, "edu", 0x010000ed, 0x04, 0x60, 0x64},
    {0xf10d1234, "primer", 0xf10d0001, 0x04, 0x14, 0x18},
    {0x32534348, "serial", 0, 0, 0, 0},
};

static int failures;
static int container = -1, group = -1; /* of the device in use */

static void said(int ok, const char *name, const char *format, ...)
{
    va_list arguments;
    printf("vfiod-guest: %s %s ", ok ? "ok" : "FAILED", name);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
    failures += !ok;
}

static int put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);
    ssize_t wrote = fd < 0 ? -1 : write(fd, text, strlen(text));
    if (fd >= 0)
        close(fd);
    return wrote == (ssize_t)strlen(text) ? 0 : -1;
}

static uint32_t hex_of(const char *device, const char *file)
{
    char path[256], text[32] = "";
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", device, file);
    int fd = open(path, O_RDONLY);
    if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
        return 0;
    close(fd);
    return strtoul(text, NULL, 16);
}

/*
 * A device that is plugged in shows in sysfs before its BARs have addresses and the bridge above lets them through:
 * who uses it then reads zeros. /proc/bus/pci has it after that (pci_bus_add_device).
 */
static int complete(const char *address)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/bus/pci/%.2s/%.4s", address + strlen("0000:"), address + strlen("0000:00:"));
    return !access(path, F_OK);
}

static const struct model *find(char *address, size_t size)
{
    DIR *all = opendir("/sys/bus/pci/devices");
    struct dirent *entry;
    while (all && (entry = readdir(all)))
        if (entry->d_name[0] != '.') {
            uint32_t id = hex_of(entry->d_name, "device") << 16 | hex_of(entry->d_name, "vendor");
            for (size_t i = 0; i < sizeof models / sizeof *models; i++)
                if (models[i].id == id) {
                    snprintf(address, size, "%.63s", entry->d_name);
                    closedir(all);
                    return &models[i];
                }
        }
    return NULL;
}

static volatile uint32_t *mapped(const char *address, int bar, size_t size)
{
    char path[256];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/enable", address);
    put(path, "1");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/resource%d", address, bar);
    int fd = open(path, O_RDWR | O_SYNC);
    void *memory = fd < 0 ? MAP_FAILED : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0)
        close(fd);
    return memory == MAP_FAILED ? NULL : memory;
}

static void registers(const struct model *model, const char *address)
{
    volatile uint32_t *bar = mapped(address, 0, PAGE);
    if (!bar) {
        said(0, "registers", "BAR 0 cannot be mapped: %s", strerror(errno));
        return;
    }
    uint32_t identity = bar[0];
    said(identity == model->identity, "identity", "0x%08x", identity);
    bar[model->inverting / 4] = 0x12345678;
    uint32_t inverted = bar[model->inverting / 4];
    said(inverted == ~0x12345678u, "inverted", "0x%08x", inverted);
    munmap((void *)bar, PAGE);
    if (!strcmp(model->name, "primer")) {
        volatile uint32_t *memory = mapped(address, 2, PAGE);
        if (!memory) {
            said(0, "memory", "BAR 2 cannot be mapped: %s", strerror(errno));
            return;
        }
        uint32_t before = memory[0];
        memory[0] = before + 1;
        said(memory[0] == before + 1, "memory", "was 0x%08x", before);
        munmap((void *)memory, PAGE);
    }
}

static int vfio_device(const char *address)
{
    char path[256], link[256], name[64];
    put("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "1");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/enable", address);
    put(path, "0");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver_override", address);
    put(path, "vfio-pci");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", address);
    ssize_t length = -1;
    /* A device that has just come may not be bound for a moment longer. */
    for (int tries = 0; length < 0 && tries < WAIT_MS; tries += 20) {
        put("/sys/bus/pci/drivers_probe", address);
        length = readlink(path, link, sizeof link - 1);
        if (length < 0)
            usleep(20000);
    }
    if (length < 0)
        return -1;
    link[length] = 0;
    snprintf(name, sizeof name, "/dev/vfio/noiommu-%.40s", strrchr(link, '/') + 1);
    container = open("/dev/vfio/vfio", O_RDWR);
    group = open(name, O_RDWR);
    if (container < 0 || group < 0 || ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) ||
        ioctl(container, VFIO_SET_IOMMU, VFIO_NOIOMMU_IOMMU))
        return -1;
    return ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address);
}

static int set_irq(int device, unsigned index, uint32_t flags, int eventfd_number)
{
    union { struct vfio_irq_set set; char bytes[sizeof(struct vfio_irq_set) + sizeof(int32_t)]; } request;
    request.set.argsz = eventfd_number < 0 ? sizeof request.set : sizeof request;
    request.set.flags = flags;
    request.set.index = index;
    request.set.start = 0;
    request.set.count = eventfd_number >= 0;
    memcpy(request.set.data, &eventfd_number, sizeof eventfd_number);
    return ioctl(device, VFIO_DEVICE_SET_IRQS, &request);
}

static uint64_t bar_offset(int device)
{
    struct vfio_region_info info = {.argsz = sizeof info, .index = VFIO_PCI_BAR0_REGION_INDEX};
    return ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) ? 0 : info.offset;
}

static void store(int device, uint64_t offset, uint32_t value)
{
    if (pwrite(device, &value, sizeof value, offset) != sizeof value)
        said(0, "store", "0x%llx: %s", (unsigned long long)offset, strerror(errno));
}

static uint32_t load(int device, uint64_t offset)
{
    uint32_t value = 0;
    if (pread(device, &value, sizeof value, offset) != sizeof value)
        said(0, "load", "0x%llx: %s", (unsigned long long)offset, strerror(errno));
    return value;
}

static int arrives(int fd)
{
    struct pollfd one = {fd, POLLIN, 0};
    uint64_t count;
    return poll(&one, 1, WAIT_MS) == 1 && read(fd, &count, sizeof count) == sizeof count;
}

static void interrupt(int device, uint64_t bar, const struct model *model, const char *name, unsigned index)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (set_irq(device, index, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, fd)) {
        said(0, name, "SET_IRQS: %s", strerror(errno));
        return;
    }
    int came = 0;
    for (int round = 0; round < 2; round++) {
        store(device, bar + model->raise, 1);
        came += arrives(fd);
        store(device, bar + model->acknowledge, 1);
        if (index == VFIO_PCI_INTX_IRQ_INDEX) {
            struct vfio_irq_set unmask = {sizeof unmask, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK, index, 0, 1};
            ioctl(device, VFIO_DEVICE_SET_IRQS, &unmask);
        }
    }
    said(came == 2, name, "%d of 2", came);
    set_irq(device, index, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, -1);
    close(fd);
}

static uint64_t physical(void *address)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, sizeof entry, (uintptr_t)address / PAGE * sizeof entry) != sizeof entry)
        return 0;
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

static void wait_for(int device, uint64_t offset, uint32_t mask, uint32_t value)
{
    for (int tries = 0; tries < 6000 && (load(device, offset) & mask) != value; tries++)
        usleep(10000);
}

static void transfer(int device, uint64_t bar, const struct model *model, uint64_t memory, int to_guest)
{
    if (!strcmp(model->name, "edu")) {
        uint64_t local = 0x40000, source = to_guest ? local : memory, destination = to_guest ? memory : local;
        store(device, bar + 0x80, source), store(device, bar + 0x84, source >> 32);
        store(device, bar + 0x88, destination), store(device, bar + 0x8c, destination >> 32);
        store(device, bar + 0x90, 256), store(device, bar + 0x94, 0);
        store(device, bar + 0x98, 1 | (to_guest ? 2 : 0));
        wait_for(device, bar + 0x98, 1, 0);
    } else {
        store(device, bar + 0x20, memory), store(device, bar + 0x24, memory >> 32);
        store(device, bar + 0x28, 0), store(device, bar + 0x2c, 256);
        store(device, bar + 0x30, 1 | (to_guest ? 2 : 0));
        wait_for(device, bar + 0x34, 1, 1);
    }
}

static void dma(int device, uint64_t bar, const struct model *model)
{
    uint8_t *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
    for (int i = 0; i < 256; i++)
        pages[i] = i * 7 + 1, pages[PAGE + i] = 0;
    uint64_t from = physical(pages), to = physical(pages + PAGE);
    transfer(device, bar, model, from, 0);
    transfer(device, bar, model, to, 1);
    int same = 0;
    while (same < 256 && pages[same] == pages[PAGE + same])
        same++;
    said(from && to && same == 256, "dma", "%d of 256 bytes, from 0x%llx to 0x%llx", same, (unsigned long long)from,
         (unsigned long long)to);
}

static void drive(const struct model *model, const char *address)
{
    int device = vfio_device(address);
    if (device < 0) {
        said(0, "vfio", "%s", strerror(errno));
        return;
    }
    struct vfio_region_info config = {.argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX};
    ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config);
    uint16_t command = COMMAND_MEMORY | COMMAND_MASTER;
    if (pwrite(device, &command, sizeof command, config.offset + CONFIG_COMMAND) != sizeof command)
        said(0, "command", "%s", strerror(errno));
    uint64_t bar = bar_offset(device);
    interrupt(device, bar, model, "msi", VFIO_PCI_MSI_IRQ_INDEX);
    interrupt(device, bar, model, "intx", VFIO_PCI_INTX_IRQ_INDEX);
    dma(device, bar, model);
    close(device), close(group), close(container);
}

/* The tty of a port of the card: the wanted-th, by number, whose place in sysfs lies below the card's. */
static int tty_of(const char *address, int wanted, char *name, size_t size)
{
    for (int number = 0; number < 64; number++) {
        char path[256], real[4096];
        snprintf(path, sizeof path, "/sys/class/tty/ttyS%d", number);
        if (realpath(path, real) && strstr(real, address) && !wanted--) {
            snprintf(name, size, "ttyS%d", number);
            return 1;
        }
    }
    return 0;
}

static unsigned long interrupts_of(const char *name)
{
    static char text[1 << 16];
    int fd = open("/proc/interrupts", O_RDONLY);
    size_t have = 0;
    for (ssize_t more; fd >= 0 && have < sizeof text - 1 && (more = read(fd, text + have, sizeof text - 1 - have)) > 0;)
        have += more;
    text[have] = 0;
    close(fd);
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        if (strstr(line, name) && strchr(line, ':'))
            return strtoul(strchr(line, ':') + 1, NULL, 10);
    return 0;
}

static void serial(const char *address, int ports)
{
    for (int port = 0; port < ports; port++) {
        char name[16], path[32];
        if (!tty_of(address, port, name, sizeof name)) {
            said(0, "tty", "port %d has none", port);
            continue;
        }
        snprintf(path, sizeof path, "/dev/%s", name);
        int fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK);
        struct termios mode;
        if (fd < 0 || tcgetattr(fd, &mode)) {
            said(0, "tty", "%s: %s", name, strerror(errno));
            continue;
        }
        cfmakeraw(&mode);
        cfsetspeed(&mode, B115200);
        mode.c_cflag |= CLOCAL | CREAD;
        tcsetattr(fd, TCSANOW, &mode);
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
        said(1, "tty", "port %d is %s", port, name);
        dprintf(fd, "port %d of %d\n", port, ports);
        char text[256];
        size_t have = 0, all = 0;
        int ended = 0;
        while (!ended) {
            ssize_t more = read(fd, text + have, sizeof text - have);
            if (more <= 0)
                break;
            have += more;
            char *end;
            while (!ended && (end = memchr(text, '\n', have))) {
                size_t length = end + 1 - text;
                ended = length == 4 && !memcmp(text, "end", 3);
                for (size_t i = 0; i < length; i++)
                    text[i] = isupper((unsigned char)text[i]) ? tolower(text[i]) : toupper(text[i]);
                if (write(fd, text, length) != (ssize_t)length)
                    said(0, "write", "%s: %s", name, strerror(errno));
                all += length;
                memmove(text, text + length, have -= length);
            }
        }
        tcdrain(fd);
        said(ended, "echoed", "%zu bytes", all);
        unsigned long interrupts = interrupts_of(name);
        said(interrupts > 0, "interrupts", "%lu of %s", interrupts, name);
        close(fd);
    }
}

int main(void)
{
    static char line[4096];
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    int fd = open("/proc/cmdline", O_RDONLY);
    if (fd < 0 || read(fd, line, sizeof line - 1) < 0)
        said(0, "cmdline", "%s", strerror(errno));

    const char *given = strstr(line, "vfiod.rounds=");
    int rounds = given ? atoi(given + strlen("vfiod.rounds=")) : 0;
    for (int round = 0; round < (rounds ? rounds : 1); round++) {
        char address[64] = "";
        const struct model *model = NULL;
        for (int tries = 0; !(model = find(address, sizeof address)) && rounds && tries < WAIT_MS; tries += 20)
            usleep(20000);
        for (int tries = 0; model && !complete(address) && tries < WAIT_MS; tries += 20)
            usleep(20000);
        said(model != NULL, "found", "%s at %s", model ? model->name : "none", address);
        given = strstr(line, "vfiod.serial=");
        if (model && given) {
            serial(address, atoi(given + strlen("vfiod.serial=")));
        } else if (model) {
            registers(model, address);
            drive(model, address);
        }
        printf("vfiod-guest: done %d\n", failures);
        fflush(stdout);
        for (int tries = 0; rounds && find(address, sizeof address) && tries < WAIT_MS; tries += 20)
            usleep(20000);
        if (rounds)
            said(!find(address, sizeof address), "gone", "round %d", round);
    }
    if (strstr(line, "vfiod.then=wait"))
        for (;;)
            pause();
    sync();
    reboot(strstr(line, "vfiod.then=reboot") ? RB_AUTOBOOT : RB_POWER_OFF);
    return 0;
}
