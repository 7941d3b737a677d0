"""Which paths stay reachable: what is shared with others is judged as such."""

from __future__ import annotations

from pathlib import Path

from vfiod.server.sandbox import files
from vfiod.server.sandbox.landlock import KEEP, MAKE, READ, Rule, file_rights


def test_sockets_are_made_in_directories_of_ones_own(tmp_path: Path) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir()
    shared.mkdir()
    shared.chmod(0o1777)
    paths = [f"{own}/a", f"{own}/b", f"{shared}/c", "/run/d"]
    assert files.for_sockets(paths) == [Rule(str(own), MAKE)]
    assert files.for_sockets(paths, shared=True) == [Rule(str(one), MAKE) for one in (own, shared, "/run")]


def test_the_device_tree_stays_readable() -> None:
    """``of_node`` of a device in /sys/devices is a link to it."""
    assert Rule("/sys/firmware/devicetree", READ) in files.for_python()


def test_what_is_named_is_kept_or_read() -> None:
    assert files.for_paths(["/a", "ro:/b"]) == [Rule("/a", KEEP), Rule("/b", READ)]


def test_a_configuration_is_found_again_when_another_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "real.toml").touch()
    (tmp_path / "link.toml").symlink_to(tmp_path / "real.toml")
    assert files.for_configuration(f"{tmp_path}/link.toml") == [Rule(str(tmp_path), READ)]
    assert files.for_configuration("/etc/vfiod.toml") == [Rule("/etc/vfiod.toml", READ)]


def test_a_file_has_the_rights_of_a_file() -> None:
    assert file_rights(KEEP, 7, directory=False) < file_rights(KEEP, 7, directory=True)
    assert file_rights(KEEP, 1, directory=True) & ~0x1FFF == 0, "the first version knows 13"
