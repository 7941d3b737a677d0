"""`vfiod host bind` and `unbind`, killed after every single write, and put right afterwards; and who is refused.

The tree is files; a small kernel stands behind the three attributes that act. A crash is a real one: the process is
gone, with no handler, no `finally`, and what it had not written is not there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from vfiod.client.host import binding
from vfiod.client.host.journal import Entry, Journal
from vfiod.client.host.names import PciNames
from vfiod.client.host.program import main
from vfiod.client.host.sysfs import HostError, Sysfs

NIC, BARE, OVERRIDDEN = "0000:02:00.0", "0000:03:00.0", "0000:04:00.0"
HAD = {NIC: ("igb", None), BARE: (None, None), OVERRIDDEN: ("uio", "uio")}
CRASHED = 77


class Kernel(Sysfs):
    """A tree that answers as a kernel does: a probe binds what `driver_override` names, or the ids' own driver."""

    refuses: frozenset[str] = frozenset()

    def write(self, path: Path, text: str) -> None:
        address = text.strip()
        if path.name == "unbind":
            super().write(path, text)
            (self.path(address) / "driver").unlink()
            self.count()
            return
        super().write(path, text)
        if path.name == "drivers_probe" and not (self.path(address) / "driver").is_symlink():
            device = self.path(address)
            wanted = self.device(address).override or (device / "natural").read_text()
            if wanted and wanted not in self.refuses and (self.bus / "drivers" / wanted).exists():
                (device / "driver").symlink_to(self.bus / "drivers" / wanted)
        self.count()

    def count(self) -> None:
        """Called when a write is done."""


class Fragile:
    """Ends this process at the n-th write."""

    def __init__(self, left: int) -> None:
        self.left = left

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(CRASHED)


class FragileKernel(Kernel):
    fragile: Fragile

    def count(self) -> None:
        self.fragile.count()


class FragileJournal(Journal):
    fragile: Fragile

    def put(self, entry: Entry) -> None:
        self.fragile.count()
        super().put(entry)
        self.fragile.count()

    def remove(self, address: str) -> None:
        self.fragile.count()
        super().remove(address)
        self.fragile.count()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    bus = tmp_path / "bus/pci"
    for name in ("vfio-pci", "mlx5_vfio_pci", "igb", "uio"):
        (bus / "drivers" / name).mkdir(parents=True)
        (bus / "drivers" / name / "unbind").touch()
    (bus / "drivers_probe").touch()
    (bus / "devices").mkdir()
    for address, (driver, override) in HAD.items():
        path = tmp_path / "devices/pci0000:00" / address
        path.mkdir(parents=True)
        for name, value in (("vendor", 0x8086), ("device", 0x1533), ("class", 0x020000)):
            (path / name).write_text(f"{value:#x}\n")
        (path / "driver_override").write_text(override or "(null)")
        (path / "natural").write_text("igb" if address == NIC else "")
        if driver is not None:
            (path / "driver").symlink_to(bus / "drivers" / driver)
        (bus / "devices" / address).symlink_to(path)
    return tmp_path


def kernel(root: Path) -> Kernel:
    return Kernel(root, names=PciNames())


def journal(root: Path) -> Journal:
    return Journal(root / "state")


def state(root: Path, address: str) -> tuple[str | None, str | None]:
    device = kernel(root).device(address)
    return device.driver, device.override


def crash(root: Path, after: int, work: Callable[[Sysfs, Journal], object]) -> bool:
    """Do it in a process that dies after so many writes. Whether it died; False: it was done before that."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fragile = Fragile(after)
            tree, notes = FragileKernel(root, names=PciNames()), FragileJournal(root / "state")
            tree.fragile = notes.fragile = fragile
            work(tree, notes)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, CRASHED)
    return status == CRASHED


def put(root: Path, address: str) -> Callable[[], None]:
    """What brings a device back to where it was."""

    def again() -> None:
        path = root / "devices/pci0000:00" / address
        driver, override = HAD[address]
        (path / "driver").unlink(missing_ok=True)
        if driver is not None:
            (path / "driver").symlink_to(root / "bus/pci/drivers" / driver)
        (path / "driver_override").write_text(override or "(null)")
        journal(root).remove(address)

    return again


@pytest.mark.parametrize("address", HAD)
def test_there_and_back(root: Path, address: str) -> None:
    """With its own driver and its own override again, which the kernel alone would not have chosen."""
    driver, _ = HAD[address]
    assert binding.bind(kernel(root), address, journal=journal(root)) == binding.Bound(address, driver, "vfio-pci")
    entry = journal(root).entry(address)
    assert entry is not None and (entry.phase, entry.original) == ("bound", driver)
    assert binding.unbind(kernel(root), address, journal=journal(root)) == binding.Bound(address, "vfio-pci", driver)
    assert state(root, address) == HAD[address]
    assert list(journal(root).entries()) == []


@pytest.mark.parametrize("address", HAD)
def test_bind_killed_anywhere(root: Path, address: str) -> None:
    again, after = put(root, address), 0
    ended: set[str | None] = set()
    while crash(root, after := after + 1, lambda tree, notes: binding.bind(tree, address, journal=notes)):
        for one in binding.recover(kernel(root), journal(root)):
            assert one.problem is None
        now = state(root, address)
        assert now in (HAD[address], ("vfio-pci", "vfio-pci")), after
        ended.add(now[0])
        assert {one.phase for one in journal(root).entries()} == ({"bound"} if now[0] == "vfio-pci" else set())
        if now[0] == "vfio-pci":
            binding.unbind(kernel(root), address, journal=journal(root))
        assert state(root, address) == HAD[address], after
        again()
    assert after > 8 and ended == {HAD[address][0], "vfio-pci"}, "it was undone early, and completed late"


@pytest.mark.parametrize("address", HAD)
def test_unbind_killed_anywhere(root: Path, address: str) -> None:
    after = 0
    while True:
        put(root, address)()
        binding.bind(kernel(root), address, journal=journal(root))
        if not crash(root, after := after + 1, lambda tree, notes: binding.unbind(tree, address, journal=notes)):
            break
        binding.recover(kernel(root), journal(root))
        if state(root, address) != HAD[address]:  # before anything was noted: it is as nobody had begun
            assert after == 1 and state(root, address) == ("vfio-pci", "vfio-pci")
        else:
            assert list(journal(root).entries()) == []
    assert after > 5


@pytest.mark.parametrize("address", [NIC, OVERRIDDEN])
def test_recovery_killed_anywhere(root: Path, address: str) -> None:
    """Killed while it puts right what was killed: the next time it is put right."""
    died = 0
    for first in range(3, 8):
        for second in range(1, 9):
            put(root, address)()
            assert crash(root, first, lambda tree, notes: binding.bind(tree, address, journal=notes))
            died += crash(root, second, lambda tree, notes: binding.recover(tree, notes))
            assert all(one.problem is None for one in binding.recover(kernel(root), journal(root)))
            assert state(root, address) in (HAD[address], ("vfio-pci", "vfio-pci")), (first, second)
    assert died > 10


def test_the_next_bind_puts_it_right_by_itself(root: Path) -> None:
    """Killed between two drivers: the device has none. Binding again remembers the first one all the same."""
    assert crash(root, 6, lambda tree, notes: binding.bind(tree, NIC, journal=notes))
    assert state(root, NIC) == (None, "vfio-pci")
    assert binding.bind(kernel(root), NIC, journal=journal(root)).before == "igb"
    binding.unbind(kernel(root), NIC, journal=journal(root))
    assert state(root, NIC) == HAD[NIC]


def test_from_one_vfio_driver_to_another(root: Path) -> None:
    binding.bind(kernel(root), NIC, journal=journal(root))
    binding.bind(kernel(root), NIC, "mlx5_vfio_pci", journal=journal(root))
    assert binding.unbind(kernel(root), NIC, journal=journal(root)).after == "igb"
    assert state(root, NIC) == HAD[NIC]


def test_nothing_to_give_back(root: Path) -> None:
    """A device that works for the host is not taken from its driver, not for a moment."""
    with pytest.raises(HostError, match="has 'igb', nobody gave it to VFIO"):
        binding.unbind(kernel(root), NIC, journal=journal(root))
    assert not (root / "bus/pci/drivers/igb/unbind").read_text()


def test_a_refusal_leaves_no_entry(root: Path) -> None:
    tree = kernel(root)
    tree.refuses = frozenset({"vfio-pci"})
    with pytest.raises(HostError, match=r"did not take .* It has igb again"):
        binding.bind(tree, NIC, journal=journal(root))
    assert state(root, NIC) == HAD[NIC]
    assert list(journal(root).entries()) == []


def test_the_former_driver_is_gone(root: Path) -> None:
    """Unloaded meanwhile: the device ends without one, as the kernel would have it."""
    binding.bind(kernel(root), OVERRIDDEN, journal=journal(root))
    (root / "bus/pci/drivers/uio/unbind").unlink()
    (root / "bus/pci/drivers/uio").rmdir()
    assert binding.unbind(kernel(root), OVERRIDDEN, journal=journal(root)).after is None


def test_what_cannot_be_put_right_stays(root: Path) -> None:
    assert crash(root, 6, lambda tree, notes: binding.bind(tree, NIC, journal=notes))
    tree = kernel(root)
    tree.refuses = frozenset({"igb"})
    (told,) = binding.recover(tree, journal(root))
    assert told.problem == f"{NIC} had igb, and has no driver now"
    assert [one.phase for one in journal(root).entries()] == ["binding"]
    assert [one.driver for one in binding.recover(kernel(root), journal(root))] == ["igb"]


def test_an_unplugged_device(root: Path) -> None:
    assert crash(root, 6, lambda tree, notes: binding.bind(tree, NIC, journal=notes))
    (root / "bus/pci/devices" / NIC).unlink()
    assert binding.recover(kernel(root), journal(root)) == [binding.Recovered(NIC, "binding", None)]
    assert list(journal(root).entries()) == []


class TestJournal:
    def test_modes(self, root: Path) -> None:
        binding.bind(kernel(root), NIC, journal=journal(root))
        assert (root / "state").stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in (root / "state").iterdir()} == {0o600}

    def test_a_directory_others_can_write(self, root: Path) -> None:
        (root / "state").mkdir()
        (root / "state").chmod(0o777)
        with pytest.raises(HostError, match="not this user's alone"):
            binding.bind(kernel(root), NIC, journal=journal(root))
        assert state(root, NIC) == HAD[NIC]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"address":"x"}', '{"address":"x","phase":"y","driver":"z"}'])
    def test_nonsense(self, root: Path, text: str) -> None:
        (root / "state").mkdir(mode=0o700)
        (root / "state" / f"{NIC}.json").write_text(text)
        with pytest.raises(HostError, match="is no entry of the journal"):
            binding.bind(kernel(root), NIC, journal=journal(root))
        assert state(root, NIC) == HAD[NIC]

    def test_another_boot(self, root: Path) -> None:
        (root / "state").mkdir(mode=0o700)
        (root / "state" / f"{NIC}.json").write_text(
            f'{{"address":"{NIC}","phase":"binding","driver":"vfio-pci","boot":"another"}}'
        )
        assert binding.recover(kernel(root), journal(root)) == []

    def test_the_program(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It has the tree of files only, with nothing behind it; a device without a driver can be put right in that."""
        assert crash(root, 3, lambda tree, notes: binding.bind(tree, BARE, journal=notes))
        assert state(root, BARE) == (None, "vfio-pci")
        assert main(["recover", "--sysfs", str(root), "--state", str(root / "state")]) == 0
        assert capsys.readouterr().out == f"{BARE}: binding had been cut short; it has no driver now\n"
        assert state(root, BARE) == HAD[BARE]
        assert main(["recover", "--sysfs", str(root), "--state", str(root / "state")]) == 0
        assert capsys.readouterr().out == "nothing was cut short\n"


class TestInUse:
    def disk(self, root: Path, mountinfo: str, swaps: str = "") -> Sysfs:
        """An NVMe disk: a partition, and a logical volume on it."""
        part = root / f"devices/pci0000:00/{BARE}/nvme/nvme0/nvme0n1/nvme0n1p1"
        (part / "holders").mkdir(parents=True)
        (part / "dev").write_text("259:1\n")
        volume = root / "devices/virtual/block/dm-0"
        (volume / "holders").mkdir(parents=True)
        (volume / "dev").write_text("254:0\n")
        (part / "holders/dm-0").symlink_to(volume)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text(mountinfo)
        (root / "proc/swaps").write_text("Filename Type Size Used Priority\n" + swaps)
        return Kernel(root, names=PciNames(), proc=root / "proc")

    @pytest.mark.parametrize(
        ("mountinfo", "swaps", "said"),
        [
            ("22 1 254:0 / / rw - ext4 /dev/mapper/root rw\n", "", "the root file system is mounted from nvme0n1p1"),
            ("22 1 0:27 / /srv rw shared:1 - btrfs /dev/nvme0n1p1 rw\n", "", "/srv is mounted from nvme0n1p1"),
            ("22 1 259:1 / /home rw - ext4 x rw\n", "", "/home is mounted from nvme0n1p1"),
            ("", "/dev/dm-0 partition 1 0 -2\n", r"nvme0n1p1 \(as dm-0\) is swap"),
        ],
    )
    def test_disks(self, root: Path, mountinfo: str, swaps: str, said: str) -> None:
        tree = self.disk(root, mountinfo, swaps)
        with pytest.raises(HostError, match=f"in use: {said}.*--force"):
            binding.bind(tree, BARE, journal=journal(root))
        assert state(root, BARE) == HAD[BARE]
        assert binding.bind(tree, BARE, force=True, journal=journal(root)).after == "vfio-pci"

    def test_a_free_disk(self, root: Path) -> None:
        tree = self.disk(root, "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
        assert binding.bind(tree, BARE, journal=journal(root)).after == "vfio-pci"

    def test_the_only_network_card(self, root: Path) -> None:
        """Down, and still what the host would be reached by; with a second one it may go."""
        for address, name in ((NIC, "eth0"), (OVERRIDDEN, "eth1")):
            interface = root / f"devices/pci0000:00/{address}/net/{name}"
            interface.mkdir(parents=True)
            (interface / "operstate").write_text("down\n")
            (interface / "device").symlink_to(root / "devices/pci0000:00" / address)
        (root / "class/net").mkdir(parents=True)
        (root / "class/net/eth0").symlink_to(root / f"devices/pci0000:00/{NIC}/net/eth0")
        with pytest.raises(HostError, match="eth0 is this host's only network card"):
            binding.bind(kernel(root), NIC, journal=journal(root))
        (root / "class/net/eth1").symlink_to(root / f"devices/pci0000:00/{OVERRIDDEN}/net/eth1")
        assert binding.bind(kernel(root), NIC, journal=journal(root)).after == "vfio-pci"

    def test_somebody_has_it_open(self, root: Path) -> None:
        """The kernel would wait for it: refused, unless that is what is wanted."""
        binding.bind(kernel(root), NIC, journal=journal(root))
        (root / f"devices/pci0000:00/{NIC}/iommu_group").symlink_to(root / "kernel/iommu_groups/7")
        (root / "proc/4711/fd").mkdir(parents=True)
        (root / "proc/4711/comm").write_text("qemu-system-x86\n")
        (root / "proc/4711/fd/9").symlink_to("/dev/vfio/7")
        tree = Kernel(root, names=PciNames(), proc=root / "proc")
        with pytest.raises(HostError, match=r"process 4711 \(qemu-system-x86\) has /dev/vfio/7 open.*--force"):
            binding.unbind(tree, NIC, journal=journal(root))
        assert binding.unbind(tree, NIC, force=True, journal=journal(root)).after == "igb"


class Interrupting:
    """Ctrl-C at the n-th write."""

    def __init__(self, left: int) -> None:
        self.left = left

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("address", [NIC, BARE, OVERRIDDEN])
def test_control_c_at_every_write(root: Path, address: str) -> None:
    """The change is made whole first: never does a device stay between two drivers, and there is nothing to recover."""
    after = 0
    done = False
    while not done:
        after += 1
        done = True
        for change, driver in ((binding.bind, "vfio-pci"), (binding.unbind, HAD[address][0])):
            fragile = Interrupting(after)
            tree, notes = FragileKernel(root, names=PciNames()), FragileJournal(root / "state")
            tree.fragile = notes.fragile = fragile  # type: ignore[assignment]
            try:
                change(tree, address, journal=notes)
            except KeyboardInterrupt:
                done = False
            assert state(root, address)[0] == driver, after
            assert binding.recover(kernel(root), journal(root)) == [], after
        assert state(root, address) == HAD[address]
    assert after > 5, "there were writes to interrupt"
