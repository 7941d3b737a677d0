"""What each system call may plausibly say, by the kernel's sources and manuals; the most telling first."""

from __future__ import annotations

import errno as e

from tests.fuzz.faults.injector import EMPTY, SHORT

__all__ = ["plausible", "plausible_of_process"]

_COMMON = (e.ENODEV, e.EIO, e.ENOMEM, e.EFAULT, e.EINTR, e.EAGAIN)
"""A device that was taken away (vfio_device_pm, pci_channel_offline), and what any ioctl may say."""

_PLAUSIBLE: dict[str, tuple[int, ...]] = {
    # open(2), drivers/vfio/group.c, device_cdev.c
    "open": (e.EMFILE, e.ENOENT, e.EACCES, e.EPERM, e.EBUSY, e.ENFILE, e.ENODEV, e.ENXIO, e.ENOMEM, e.EINTR),
    # vfio_pci_core_rw, vfio_ccw_chp.c
    "pread": (e.EIO, SHORT, EMPTY, e.ENODEV, e.EFAULT, e.EINVAL, e.EAGAIN, e.EINTR, e.EPERM),
    "pwrite": (e.EIO, SHORT, EMPTY, e.ENODEV, e.EFAULT, e.EINVAL, e.EAGAIN, e.EINTR, e.ENOSPC, e.EBUSY),
    "map": (e.ENOMEM, e.EINVAL, e.EACCES, e.EPERM, e.ENODEV, e.EAGAIN, e.EBUSY),
    "blank": (e.ENOMEM,),
    "eventfd": (e.EMFILE, e.ENFILE, e.ENOMEM, e.ENODEV),
    # sysfs and procfs: what was there a moment ago is gone, or may not be looked at (Landlock, no /sys)
    "read_text": (e.ENOENT, e.EACCES, e.EMFILE, e.ENODEV, e.EIO, e.ENOMEM, SHORT),
    "read_link": (e.ENOENT, e.EACCES, e.ENOMEM),
    "real_path": (e.ENOENT, e.EACCES, e.ELOOP),
    "list_directory": (e.ENOENT, e.EACCES, e.EMFILE, e.ENOMEM, SHORT),
    "exists": (e.ENOENT,),
    "same_file": (e.EINVAL,),
    "memory_locked": (e.EMFILE, e.EACCES),
    "may_lock_any_memory": (e.EMFILE, e.EACCES),
    "open_files": (e.EMFILE, e.EACCES),
    # drivers/vfio/group.c, container.c
    "VFIO_GET_API_VERSION": (e.EINVAL, e.ENOTTY),
    "VFIO_CHECK_EXTENSION": (e.EINVAL, e.ENOTTY),
    "VFIO_SET_IOMMU": (e.EPERM, e.EBUSY, e.EINVAL, *_COMMON),
    "VFIO_GROUP_GET_STATUS": (e.EFAULT, e.ENODEV, e.EINTR),
    "VFIO_GROUP_SET_CONTAINER": (e.EBUSY, e.EPERM, e.EINVAL, e.EBADFD, *_COMMON),
    "VFIO_GROUP_UNSET_CONTAINER": (e.EBUSY, e.EINVAL, e.EINTR),
    "VFIO_GROUP_GET_DEVICE_FD": (e.EMFILE, e.EBUSY, e.EINVAL, e.EPERM, e.EACCES, *_COMMON),
    # drivers/vfio/vfio_iommu_type1.c
    "VFIO_IOMMU_GET_INFO": (e.EINVAL, e.EFAULT, e.ENOMEM),
    "VFIO_IOMMU_MAP_DMA": (e.ENOMEM, e.ENOSPC, e.EEXIST, e.EINVAL, e.EBUSY, e.EFAULT, e.EINTR, e.EAGAIN, e.ENODEV),
    "VFIO_IOMMU_UNMAP_DMA": (e.EINVAL, e.EFAULT, e.EBUSY, e.ENOENT, e.ENOMEM),
    # drivers/vfio/device_cdev.c, drivers/iommu/iommufd
    "VFIO_DEVICE_BIND_IOMMUFD": (e.EPERM, e.EBUSY, e.EINVAL, e.EACCES, e.EBADFD, *_COMMON),
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": (e.EINVAL, e.ENOENT, e.EBUSY, e.EPERM, *_COMMON),
    "VFIO_DEVICE_DETACH_IOMMUFD_PT": (e.EINVAL, e.ENODEV, e.EIO),
    "IOMMU_IOAS_ALLOC": (e.ENOMEM, e.ENOTTY, e.ENOSPC),
    "IOMMU_IOAS_IOVA_RANGES": (e.EMSGSIZE, e.ENOENT, e.EFAULT, e.ENOMEM),
    "IOMMU_IOAS_MAP": (e.ENOMEM, e.EADDRINUSE, e.EEXIST, e.EINVAL, e.EFAULT, e.ENOSPC, e.EINTR, e.ENOENT),
    "IOMMU_IOAS_MAP_FILE": (e.ENOMEM, e.ENOTTY, e.EINVAL, e.EADDRINUSE, e.EFAULT, e.ENOSPC, e.EOPNOTSUPP, e.EBADF),
    "IOMMU_IOAS_UNMAP": (e.ENOENT, e.EBUSY, e.ENOMEM, e.EINVAL, e.EFAULT),
    "IOMMU_DESTROY": (e.EBUSY, e.ENOENT, e.EINTR),
    "IOMMU_GET_HW_INFO": (e.ENOENT, e.EOPNOTSUPP, e.ENOMEM),
    "IOMMU_IOAS_CHANGE_PROCESS": (e.ENOTTY, e.EINVAL, e.ENOMEM, e.EPERM),
    "IOMMU_OPTION": (e.EPERM, e.EOPNOTSUPP),
    # drivers/vfio/pci/vfio_pci_core.c, vfio_pci_intrs.c
    "VFIO_DEVICE_GET_INFO": (e.EINVAL, e.ENODEV, e.EFAULT, e.EIO),
    "VFIO_DEVICE_GET_REGION_INFO": (e.EINVAL, e.ENODEV, e.EFAULT, e.ENOMEM, e.EIO),
    "VFIO_DEVICE_GET_IRQ_INFO": (e.EINVAL, e.ENODEV, e.EFAULT, e.ENOMEM, e.EIO),
    "VFIO_DEVICE_SET_IRQS": (e.EBUSY, e.EINVAL, e.ENOTTY, e.ENOSPC, e.EBADF, *_COMMON),
    "VFIO_DEVICE_RESET": (e.EBUSY, e.EINVAL, e.ETIMEDOUT, e.ENOTTY, *_COMMON),
    "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO": (e.ENODEV, e.ENOSPC, e.EINVAL, e.EAGAIN, e.EFAULT, e.ENOMEM, e.EPERM),
    "VFIO_DEVICE_PCI_HOT_RESET": (e.EPERM, e.EINVAL, e.EBUSY, e.ETIMEDOUT, e.EBADF, *_COMMON),
    "VFIO_DEVICE_FEATURE": (e.ENOTTY, e.EINVAL, e.EACCES, *_COMMON),
}


def plausible(call: str) -> tuple[int, ...]:
    """What a call of this name may say, the most telling first. KeyError for one that nobody thought about."""
    return _PLAUSIBLE[call]


_OF_PROCESS: dict[str, tuple[int, ...]] = {
    # socket(2), unix(7), net/unix/af_unix.c, net/core/scm.c. That the other end is gone (EPIPE, ECONNRESET) is said
    # when it is: tests/integration/takeover/test_deaths.py kills it.
    "socket": (e.EMFILE, e.ENFILE, e.ENOBUFS, e.ENOMEM),
    "connect": (e.ECONNREFUSED, e.EAGAIN, e.EACCES, e.ENOENT, e.ENOMEM),
    "accept4": (e.EMFILE, e.ENFILE, e.ENOMEM, e.ECONNABORTED, e.EINTR),
    "getsockopt": (e.EACCES,),  # a security module
    "sendto": (e.ENOBUFS, e.ENOMEM, e.EINTR),
    "recvfrom": (e.ENOMEM, e.EINTR),
    "sendmsg": (e.ETOOMANYREFS, e.ENOMEM, e.ENOBUFS, e.EINTR),
    "recvmsg": (e.ENOMEM, e.EINTR),
    "poll": (e.ENOMEM, e.EINTR),
    "epoll_ctl": (e.ENOMEM, e.ENOSPC),
    # kernel/pid.c: an older kernel, a process that has just ended
    "pidfd_open": (e.ENOSYS, e.EMFILE, e.ESRCH, e.ENOMEM),
    "dup": (e.EMFILE,),
    "eventfd2": (e.EMFILE, e.ENFILE, e.ENOMEM),
    "memfd_create": (e.EMFILE, e.ENFILE, e.ENOMEM),
    "pipe2": (e.EMFILE, e.ENFILE),
    "ftruncate": (e.EIO, e.ENOSPC, e.EINTR),
    # mm/shmem.c, mm/mmap.c
    "pread": (e.EIO, e.ENOMEM, e.EINTR),
    "pwrite": (e.ENOSPC, e.ENOMEM, e.EIO, e.EINTR),
    "mmap": (e.ENOMEM, e.EAGAIN, e.EPERM),
}


def plausible_of_process(call: str) -> tuple[int, ...]:
    """The same for the calls of a whole process (:mod:`tests.fuzz.faults.wall`)."""
    return _OF_PROCESS[call]
