"""Which system calls there are to judge: their numbers on each machine, those the program needs, those nobody needs.

Numbers are the kernel's (``<asm/unistd_64.h>`` of x86 and s390, ``<asm-generic/unistd.h>`` for arm64). A name without a
number is not there on that machine. Values only: nothing here makes a call.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

__all__ = ["ALLOWED", "BUS", "DEADLY", "MACHINES", "Machine", "numbers_of"]


class Machine(Struct, frozen=True):
    """What a filter has to know of a machine.

    Attributes:
        column: of :data:`_NUMBERS`.
        audit: AUDIT_ARCH_* (``<linux/audit.h>``).
        big_endian: the low half of an argument comes second.
        foreign_bit: set in the numbers of a second table of calls (x32), which is refused; 0: there is none.
        clone_flags: which argument of ``clone(2)`` the flags are.
        mmap_in_memory: ``mmap`` takes a pointer to its arguments, which no filter can see (``old_mmap``).

    """

    column: int
    audit: int
    big_endian: bool = False
    foreign_bit: int = 0
    clone_flags: int = 0
    mmap_in_memory: bool = False


MACHINES: Final = {
    "x86_64": Machine(0, 0xC000003E, foreign_bit=0x40000000),
    "aarch64": Machine(1, 0xC00000B7),
    "s390x": Machine(2, 0x80000016, big_endian=True, clone_flags=1, mmap_in_memory=True),
}
"""The machines that numbers are known for, by ``uname -m``."""

ALLOWED: Final = """
    read write pread64 pwrite64 readv writev preadv pwritev preadv2 pwritev2 lseek close close_range dup dup2 dup3
    pipe pipe2 fstat newfstatat stat lstat statx fstatfs open openat access faccessat faccessat2 readlink readlinkat
    getdents64 getcwd link linkat symlink symlinkat unlink unlinkat fchmod ftruncate fallocate fsync fdatasync flock
    umask munmap mremap madvise brk msync mincore memfd_create eventfd2 epoll_create1 epoll_ctl epoll_wait epoll_pwait
    epoll_pwait2 poll ppoll select pselect6 bind listen accept accept4 getsockopt setsockopt getsockname getpeername
    shutdown recvmsg recvfrom sendmsg sendto futex set_robust_list rseq gettid getpid getppid getuid geteuid getgid
    getegid getgroups sched_yield sched_getaffinity getcpu sysinfo uname getrusage rt_sigaction rt_sigprocmask
    rt_sigreturn sigaltstack exit exit_group restart_syscall clock_gettime clock_getres clock_nanosleep nanosleep
    gettimeofday time getrandom
"""
"""Whatever their arguments are. Files are Landlock's to judge."""

BUS: Final = "sched_getparam sched_getscheduler"
"""ZeroMQ's threads ask for these when they begin, which may be after the filter came; refused, ZeroMQ aborts."""

DEADLY: Final = """
    execve execveat ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd mount umount2 pivot_root
    chroot unshare setns open_tree move_mount mount_setattr fsopen fsconfig fsmount fspick bpf perf_event_open
    userfaultfd io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key open_by_handle_at
    init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct quotactl
    personality iopl ioperm modify_ldt settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname
    setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset
"""
"""What neither this program nor Python asks for: who calls it is somebody else, and the process ends there and then."""

_NUMBERS: Final = """
accept 43 202 -
accept4 288 242 364
access 21 - 33
acct 163 89 51
add_key 248 217 278
adjtimex 159 171 124
bind 49 200 361
bpf 321 280 351
brk 12 214 45
capset 126 91 185
chroot 161 51 61
clock_adjtime 305 266 337
clock_getres 229 114 261
clock_gettime 228 113 260
clock_nanosleep 230 115 262
clock_settime 227 112 259
clone 56 220 120
clone3 435 435 435
close 3 57 6
close_range 436 436 436
connect 42 203 362
delete_module 176 106 129
dup 32 23 41
dup2 33 - 63
dup3 292 24 326
epoll_create1 291 20 327
epoll_ctl 233 21 250
epoll_pwait 281 22 312
epoll_pwait2 441 441 441
epoll_wait 232 - 251
eventfd2 290 19 323
execve 59 221 11
execveat 322 281 354
exit 60 93 1
exit_group 231 94 248
faccessat 269 48 300
faccessat2 439 439 439
fallocate 285 47 314
fchmod 91 52 94
fchownat 260 54 291
fcntl 72 25 55
fdatasync 75 83 148
finit_module 313 273 344
flock 73 32 143
fsconfig 431 431 431
fsmount 432 432 432
fsopen 430 430 430
fspick 433 433 433
fstat 5 80 108
fstatfs 138 44 100
fsync 74 82 118
ftruncate 77 46 93
futex 202 98 238
getcpu 309 168 311
getcwd 79 17 183
getdents64 217 61 220
getegid 108 177 202
geteuid 107 175 201
getgid 104 176 200
getgroups 115 158 205
getpeername 52 205 368
getpid 39 172 20
getppid 110 173 64
getrandom 318 278 349
getrusage 98 165 77
getsockname 51 204 367
getsockopt 55 209 365
gettid 186 178 236
gettimeofday 96 169 78
getuid 102 174 199
init_module 175 105 128
io_uring_enter 426 426 426
io_uring_register 427 427 427
io_uring_setup 425 425 425
ioctl 16 29 54
ioperm 173 - -
iopl 172 - -
kcmp 312 272 343
kexec_file_load 320 294 381
kexec_load 246 104 277
keyctl 250 219 280
link 86 - 9
linkat 265 37 296
listen 50 201 363
lseek 8 62 19
lstat 6 - 107
madvise 28 233 219
memfd_create 319 279 350
mincore 27 232 218
mmap 9 222 90
modify_ldt 154 - -
mount 165 40 21
mount_setattr 442 442 442
move_mount 429 429 429
mprotect 10 226 125
mremap 25 216 163
msync 26 227 144
munmap 11 215 91
nanosleep 35 101 162
newfstatat 262 79 293
open 2 - 5
open_by_handle_at 304 265 336
open_tree 428 428 428
openat 257 56 288
perf_event_open 298 241 331
personality 135 92 136
pidfd_getfd 438 438 438
pipe 22 - 42
pipe2 293 59 325
pivot_root 155 41 217
poll 7 - 168
ppoll 271 73 302
prctl 157 167 172
pread64 17 67 180
preadv 295 69 328
preadv2 327 286 376
prlimit64 302 261 334
process_madvise 440 440 440
process_vm_readv 310 270 340
process_vm_writev 311 271 341
pselect6 270 72 301
ptrace 101 117 26
pwrite64 18 68 181
pwritev 296 70 329
pwritev2 328 287 377
quotactl 179 60 131
read 0 63 3
readlink 89 - 85
readlinkat 267 78 298
readv 19 65 145
reboot 169 142 88
recvfrom 45 207 371
recvmsg 47 212 372
request_key 249 218 279
restart_syscall 219 128 7
rseq 334 293 383
rt_sigaction 13 134 174
rt_sigprocmask 14 135 175
rt_sigreturn 15 139 173
sched_getaffinity 204 123 240
sched_getparam 143 121 155
sched_getscheduler 145 120 157
sched_setscheduler 144 119 156
sched_yield 24 124 158
seccomp 317 277 348
select 23 - 142
sendmsg 46 211 370
sendto 44 206 369
set_robust_list 273 99 304
setdomainname 171 162 121
setfsgid 123 152 216
setfsuid 122 151 215
setgid 106 144 214
setgroups 116 159 206
sethostname 170 161 74
setns 308 268 339
setregid 114 143 204
setresgid 119 149 210
setresuid 117 147 208
setreuid 113 145 203
setsockopt 54 208 366
settimeofday 164 170 79
setuid 105 146 213
shutdown 48 210 373
sigaltstack 131 132 186
socket 41 198 359
socketpair 53 199 360
stat 4 - 106
statx 332 291 379
swapoff 168 225 115
swapon 167 224 87
symlink 88 - 83
symlinkat 266 36 297
sysinfo 99 179 116
tgkill 234 131 241
time 201 - -
umask 95 166 60
umount2 166 39 52
uname 63 160 122
unlink 87 - 10
unlinkat 263 35 294
unshare 272 97 303
userfaultfd 323 282 355
write 1 64 4
writev 20 66 146
"""
"""Name, x86_64, aarch64, s390x; a dash: not there."""


def numbers_of(machine: Machine) -> dict[str, int]:
    """Every known name's number on a machine."""
    rows = (line.split() for line in _NUMBERS.split("\n") if line)
    return {row[0]: int(row[machine.column + 1]) for row in rows if row[machine.column + 1] != "-"}
