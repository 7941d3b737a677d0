"""Where the program meets the kernel: system calls, what an fd is, sysfs, memory that two parties see."""
