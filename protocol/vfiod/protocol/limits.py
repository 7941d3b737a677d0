"""Every bound vfiod keeps, with its unit and its reason. Tests hold each of them."""

from __future__ import annotations

from typing import Final

# --- the stream ---------------------------------------------------------------------------------
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""Bytes of one request. QEMU stops at 64 MiB of tokens; the largest sensible request here is a
``region-write`` of :data:`MAX_REGION_TRANSFER` in base64 (1.4 MiB). Replies stay under the 10 MiB
line limit of ``qemu.qmp`` (``qemu/qmp/protocol.py``)."""

MAX_NESTING: Final = 1024
"""Levels of ``[`` and ``{`` in one request; QEMU's ``MAX_NESTING`` (``qobject/json-streamer.c``)."""

MAX_COLLECTIONS: Final = 10_000
"""Lists and objects within one call's arguments. No command takes a hundredth; each costs sixty times the byte that
says it, and the loop's time."""

MAX_ERROR_TEXT: Final = 2000
"""Characters of what was wrong that an error tells: an unknown name of a megabyte is not sent back whole."""

MAX_COMMAND_LINE: Final = 4095
"""Characters of one human monitor line: QEMU's ``READLINE_CMD_BUF_SIZE`` (``include/qemu/readline.h``)."""

MAX_PATTERN: Final = 255
"""Characters of a trace pattern: each is compared with every trace point, on the loop."""

MAX_BATCH: Final = 64
"""Requests in one JSON-RPC batch: a batch answers as a whole, so it is bounded like a queue."""

READ_CHUNK: Final = 256 * 1024
"""Bytes asked of one ``recvmsg``: a whole large request in a few calls, without a large idle buffer."""

# --- sessions -----------------------------------------------------------------------------------
MAX_SESSIONS: Final = 64
"""Monitor sessions at once, all sockets together (SPDK's number; a manager needs one or two)."""

MAX_OTHER_SESSIONS: Final = 48
"""Of them, sessions that are no operators': however many observers come, a manager finds room."""

MAX_INBAND_QUEUE: Final = 8
"""In-band QMP commands in flight per session; beyond it the session is not read
(``QMP_REQ_QUEUE_LEN_MAX``, QEMU ``monitor/qmp.c``)."""

MAX_JSONRPC_IN_FLIGHT: Final = 64
"""JSON-RPC requests in flight per session; beyond it the session is not read."""

MAX_BUS_IN_FLIGHT: Final = 64
"""Calls in flight for one client of the bus; one more is refused, as a queue without end would hide it."""

MAX_BUS_CALLS: Final = 1024
"""Calls in flight on the bus; beyond it no further message is taken, and clients' own queues fill."""

MAX_BUS_FRAMES: Final = 8
"""Frames of one message on the bus that are kept: who sent it, the empty frame of a REQ socket, the call, and a few
that an error can count. What follows is dropped unread, some in each turn of the loop: ZeroMQ hands over a message
of a million frames as gladly as one of three."""

BUS_QUEUE: Final = 1000
"""Messages waiting to or from one peer of the bus (ZeroMQ's high-water mark, and its default). A reader of events
whose queue is full misses those that follow, and sees that by their numbers."""

MAX_BUS_CLIENTS: Final = 1024
"""Connections to one socket of the bus at once. Beyond it they are shut down: each has queues of its own."""

BUS_SURGE: Final = 1024
"""Connections that ZeroMQ can accept before the first too many is shut down: its own queue of reports has room for
1,000 (``ZMQ_SNDHWM`` of a monitor, which cannot be changed), ours for one, and it works in batches. So many open files
are kept free for each socket of the bus."""

BUS_HANDSHAKE_MS: Final = 5000
"""How long a peer of the bus may take to say who it is; ZeroMQ's own patience is 30 s."""

BUS_LINGER_MS: Final = 500
"""How long, at the end, what waits for peers of the bus may take to leave."""

MAX_SCRAPERS: Final = 8
"""Readers of metrics at once: a host has one, perhaps two. Beyond it, who has been reading longest is hung up on."""

MAX_SCRAPER_CONNECTIONS: Final = 64
"""Connections to the door of metrics at once. Beyond it the oldest is hung up on: a scraper asks as it comes in, and
who has said nothing for longer than 63 others is none."""

MAX_SCRAPE_REQUEST: Final = 8 * 1024
"""Bytes of a scraper's request: what common HTTP servers take for a head."""

SCRAPE_TIMEOUT_MS: Final = 5000
"""How long a scraper may take to ask and to read: half of Prometheus' own default."""

MAX_REPLY_BACKLOG: Final = 8 * 1024 * 1024
"""Bytes of replies a session may leave unread before vfiod stops reading its requests."""

MAX_EVENT_BACKLOG: Final = 1024
"""Events queued for one reader. Beyond it the newest are dropped, and ``EVENTS_LOST`` says which."""

NEGOTIATION_TIMEOUT: Final = 0
"""Seconds a session may stay silent: 0, without end. People sit at monitors; sessions are bounded in number."""

# --- take-over ------------------------------------------------------------------------------------
TAKE_OVER_MS: Final = 30_000
"""How long either end of a hand-over may be silent. Making everything anew takes a tenth of a second; a host that
swaps takes seconds, and giving up costs nothing but the new process."""

TAKE_OVER_QUIET_MS: Final = 10_000
"""How long a hand-over waits for what is under way: a reset or a large mapping takes a second or two."""

MAX_STATE_BYTES: Final = 256 * 1024 * 1024
"""Bytes of a state: 100,000 mappings are 10 MiB, a device is 10 KiB."""

MAX_STATE_FDS: Final = 1 << 20
"""fds of a state: the most a process may have open by default (``fs.nr_open``)."""

# --- file descriptors ---------------------------------------------------------------------------
MAX_FDS_PER_MESSAGE: Final = 253
"""fds in one ``sendmsg``: the kernel's ``SCM_MAX_FD`` (``include/net/scm.h``)."""

MAX_PENDING_FDS: Final = 253
"""fds received and not yet named, per session. One full message, no more: a flood is closed on arrival."""

MAX_NAMED_FDS: Final = 1024
"""fds named by ``getfd``, per session."""

MAX_FDSETS: Final = 256
"""fd sets of the machine."""

MAX_FDS_PER_SET: Final = 64
"""fds in one set."""

MAX_FD_NAME: Final = 255
"""Characters of a ``getfd`` name."""

# --- the machine --------------------------------------------------------------------------------
MAX_DEVICES: Final = 4096
"""Devices of one machine. Far above any VM (a PCI segment has 65,536 functions, a VM's bus 256)."""

MAX_OBJECTS: Final = 4096
"""Objects of one machine."""

MAX_MAPPINGS: Final = 65_535
"""Guest memory mappings: type1's default ``dma_entry_limit`` and vfio-user's ``max_dma_maps``."""

MAX_CLIENT_FILES: Final = 512
"""Files of memory that all clients of exports have mapped. A VM has one per memory backend (QEMU: 256 slots)."""

MAX_ID: Final = 127
"""Characters of a device's or object's id."""

MAX_REGION_TRANSFER: Final = 1024 * 1024
"""Bytes of one ``region-read`` or ``region-write``: vfio-user's ``max_data_xfer_size`` default."""

MAX_VECTORS: Final = 2048
"""Vectors of one index: MSI-X's table size is eleven bits (PCI 3.0, 6.8.2.3)."""

MAX_REGION_INDEXES: Final = 64
"""Regions of a device that counts its own: far above the kernel's (PCI 9, a platform device a few)."""

MAX_IRQ_INDEXES: Final = 1024
"""Interrupt indexes of a device that counts its own: a platform device has one for each of its IRQs, and an
interrupt controller 1,020 (GIC, IHI 0048B 2.2.1)."""

DEFAULT_UNPLUG_TIMEOUT_MS: Final = 5_000
"""Milliseconds ``device_del`` waits for holders: libvirt's unplug time-out on x86."""

CLOSE_TIMEOUT_MS: Final = 10_000
"""Milliseconds that work under way has to end, and devices to close, when the server ends. systemd gives 90 s."""

DEFAULT_MMAP_TIMEOUT_MS: Final = 1_100
"""Milliseconds before the fast path returns after an interrupt (QEMU ``hw/vfio/pci.c``)."""

DEFAULT_CCW_TIMEOUT_MS: Final = 10_000
"""Milliseconds a ``ccw-request`` waits for its interrupt: longer than a disk's own retries take."""

MAX_CCW_QUEUE: Final = 64
"""Requests that wait for one subchannel (``queue``). A guest has one outstanding; a person's scripts a few."""

MAX_CRWS: Final = 64
"""Channel reports read at once, and kept for ``query-crw``: the kernel's own list is short-lived and smaller."""

MAX_CHANNEL_COMMANDS: Final = 4096
"""CCWs a built-in subchannel follows in one program before it says program check: a guest's loop must end. The kernel
takes 255 in one chain; a device that loops by status modifier needs more."""

MAX_TIMEOUT_MS: Final = 24 * 3600 * 1000
"""Milliseconds: the longest time-out a command takes."""

EVENT_RATE_PERIOD_MS: Final = 1_000
"""Milliseconds between two rate-limited events of one key (QEMU ``monitor/monitor.c``)."""

MAX_MDEVS: Final = 1024
"""Mediated devices of one parent type, whatever it claims to have available."""

MDEV_CALL_MS: Final = 10_000
"""Milliseconds a parent in Python has for one callback. Then its caller is told, and nothing more is asked of it until
that call returns: a card that is slow to make is not given up, a deadlock does not hold a command for ever."""

MDEV_LOOP_CALL_MS: Final = 500
"""The same for a callback on the loop's thread (interrupts, config space): for so long everybody waits, once."""

MDEV_LOOK_MS: Final = 1_000
"""The same for what is only published (``attributes``, ``available_instances``): a query does not wait for long."""

WORKER_THREADS: Final = 8
"""Threads for calls that block in the kernel. They wait there and compute nothing (GIL)."""

# --- vfio-user ----------------------------------------------------------------------------------
VFIO_USER_MAX_TRANSFER: Final = MAX_REGION_TRANSFER
"""Bytes of data in one vfio-user message, received or sent: the specification's default of ``max_data_xfer_size``,
which QEMU and libvfio-user send as theirs."""

VFIO_USER_MAX_MESSAGE: Final = VFIO_USER_MAX_TRANSFER + 4096
"""Bytes of one whole vfio-user message: the most data there may be, and room for any header (libvfio-user's
``SERVER_MAX_MSG_SIZE``). A header that says more ends the connection: nothing after it can be trusted."""

VFIO_USER_MAX_FDS: Final = 16
"""fds of one vfio-user message, received: our ``max_msg_fds``. QEMU calls more than 16 malformed
(``VFIO_USER_MAX_MAX_FDS``, ``hw/vfio-user/protocol.h``)."""

VFIO_USER_MAX_DMA_MAPS: Final = MAX_MAPPINGS
"""DMA mappings of one vfio-user client: the specification's default; QEMU takes no more (``check_max_dma``)."""

VFIO_USER_MAX_REGIONS: Final = 100
"""Regions a vfio-user server may say its device has: QEMU's ``VFIO_USER_MAX_REGIONS`` (``hw/vfio-user/device.c``)."""

VFIO_USER_MAX_IRQS: Final = 50
"""Interrupt indexes a vfio-user server may say its device has: QEMU's ``VFIO_USER_MAX_IRQS``."""

VFIO_USER_MAX_VERSION: Final = 4096
"""Bytes of the JSON of a VERSION message; QEMU's has 205."""

VFIO_USER_MAX_WRITES: Final = 1024
"""Writes in one WRITE_MULTI; QEMU sends up to 200 (``VFIO_USER_MULTI_MAX``)."""

VFIO_USER_MAX_PENDING: Final = 4096
"""Requests of one connection that wait for replies, or whose replies nobody waits for any more. Ids have 16 bits."""

VFIO_USER_MAX_INFO: Final = 64 * 1024
"""Bytes of a region's information with its capabilities, or of a region's ioeventfds, that vfiod asks for or sends."""

DEFAULT_MSG_TIMEOUT_MS: Final = 5_000
"""Milliseconds a vfio-user server has for a reply: QEMU's ``x-msg-timeout`` (1,000 were too few with many VMs starting
at once, SPDK#2392)."""

VFIO_USER_PATIENCE: Final = 4
"""So many times ``x-msg-timeout`` a vfio-user server has for all that it is asked when it is connected, some 30 to 170
questions: one that answers each just in time would hold up every other change of the machine for minutes."""

VFIO_USER_MAX_UNREAD: Final = 8 * 1024 * 1024
"""Bytes that wait to be sent to a vfio-user peer. More: it does not read, and the connection ends."""

VFIO_USER_MAX_QUEUE: Final = 4 * 1024 * 1024
"""Bytes of requests a client may have waiting behind one that takes long; beyond it its socket is not read. While vfiod
waits for an answer of the same client's, eight times as much: the answer stands behind them."""

VFIO_USER_MAX_BACKLOG: Final = 4 * 1024 * 1024
"""Bytes of replies a client may leave unread before vfiod stops executing its requests: a few transfers."""

VFIO_USER_DMA_TIMEOUT_MS: Final = 5_000
"""Milliseconds a device waits for its client to answer DMA_READ or DMA_WRITE: QEMU's own patience with servers."""

VFIO_USER_HANDSHAKE_MS: Final = 5_000
"""Milliseconds a client may take to send VERSION: it keeps others from coming in."""

VFIO_USER_PARTING_MS: Final = 1_000
"""Milliseconds a client that is disconnected may take to read the last reply."""

MAX_EXPORTS: Final = 4096
"""Exports of one machine: as many as devices."""

# --- the client -----------------------------------------------------------------------------------
GREETING_MS: Final = 5_000
"""Milliseconds a client waits for a QMP greeting, which comes at once, before it asks what is there. Bearable for a
person; longer than a server usually takes to start, which would be asked for nothing."""

# --- the program ----------------------------------------------------------------------------------
MAX_CONFIG_SIZE: Final = 1024 * 1024
"""Bytes of a configuration file: every key with thousands of values. A log given by mistake has more."""

MAX_LOG_FIELD: Final = 48 * 1024
"""Bytes of one field of a log entry, journald's own ``LineMax``: an entry must fit a datagram (about 200 KiB)."""

MAX_STATUS: Final = 512
"""Characters of what ``systemctl status`` shows."""

MIN_WATCHDOG_USEC: Final = 10_000
"""Microseconds of ``WATCHDOG_USEC``: the loop would do nothing else but answer a watchdog that looks more often."""
