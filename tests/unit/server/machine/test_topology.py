"""``query-topology``: containers, IOASes, groups, devices, and the reset domains across them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from tests.unit.server.machine.test_hot_reset import FIRST, OTHER_BUS, SECOND, THIRD, add, add_cdev, add_iommufd

Play = Callable[[Callable[[Any], Any]], None]


def parents_of(topology: Any, child: str) -> list[str]:
    return [edge.parent for edge in topology.edges if edge.child == child]


def test_both_interfaces_mediated_devices_and_domains(play: Play) -> None:
    async def scenario(world: Any) -> None:
        world.name_memory("m")
        await world.command("dma-map", iova=0, size=1 << 20, fd="m")
        await add(world, "n0", FIRST, 7)
        await add(world, "n1", SECOND, 7, pass_group=False)
        world.kernel.add_device(THIRD, 8, driver="igb")
        world.kernel.add_device("0000:09:00.0", 7, driver="pci-stub")
        await add_iommufd(world)
        await add_cdev(world, "c0", OTHER_BUS, 9)
        uuid = await world.add("m0")
        topology = await world.command("query-topology")
        nodes = {node.id: node for node in topology.nodes}
        assert nodes["machine"].attributes == {"memory": "1 MiB in 1 mappings"}
        [container] = [node.id for node in topology.nodes if node.kind == "container"]
        [ioas] = [node.id for node in topology.nodes if node.kind == "ioas"]
        assert parents_of(topology, "group:7") == [container]
        assert parents_of(topology, container) == parents_of(topology, ioas) == ["machine"]
        assert parents_of(topology, f"mdev:{uuid}") == ["machine"]
        assert parents_of(topology, "device:m0") == [f"mdev:{uuid}"]
        [first, second] = [node.id for node in topology.nodes if node.kind == "reset-domain"]
        assert parents_of(topology, "device:n0") == parents_of(topology, "device:n1") == ["group:7", first]
        assert parents_of(topology, "device:c0") == [ioas, second]
        assert parents_of(topology, f"host:{THIRD}") == [first]  # in the way, and nobody's here
        assert parents_of(topology, "host:0000:09:00.0") == ["group:7"]
        assert nodes["host:0000:09:00.0"].attributes == {"driver": "pci-stub"}
        assert nodes[first].label == "reset of slot 0000:04:00"
        assert nodes[first].attributes["hot-reset"] == "refused"
        assert THIRD in nodes[first].attributes["reason"]
        assert nodes[second].attributes == {"hot-reset": "possible"}
        assert nodes["device:c0"].attributes["backend"] == "kernel-cdev"

    play(scenario)


def test_drawn(play: Play) -> None:
    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        tree = (await world.command("query-topology", format="tree")).text
        lines = tree.splitlines()
        assert lines[0] == "machine test"
        assert lines[1].startswith("└── container:0  (iommu type1v2")
        assert lines[2].strip() == "└── group:7"
        assert "n0  (host 0000:04:00.0, pci-id 1234:11e8, backend kernel-group, state running" in lines[3]
        assert lines[4].startswith("reset of slot 0000:04:00  (hot-reset possible)")
        svg = (await world.command("query-topology", format="svg")).text
        assert len(list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"))) == 5
        assert (await world.command("query-topology", format="dot")).text.startswith("digraph topology {")

    play(scenario)


def test_it_answers_during_a_hot_reset_without_asking_the_kernel(play: Play) -> None:
    """A query out of band answers at once; the kernel would keep it waiting for the end of the reset."""

    async def scenario(world: Any) -> None:
        await add(world, "n0", FIRST, 7)
        resets = world.machine.resets
        [info] = [world.machine.device("n0").backend.hot_reset_info()]
        world.kernel.log.clear()
        resets._under_way = {"n0": info}
        topology = await asyncio.wait_for(world.command("query-topology"), 20)
        assert [node.label for node in topology.nodes if node.kind == "reset-domain"] == ["reset of slot 0000:04:00"]
        assert (await world.command("query-hot-reset", id="n0")).possible
        assert world.kernel.log == []
        resets._under_way = {}
        await world.command("query-hot-reset", id="n0")
        assert world.kernel.log == ["VFIO_DEVICE_GET_PCI_HOT_RESET_INFO"]

    play(scenario)


def test_an_empty_machine(play: Play) -> None:
    async def scenario(world: Any) -> None:
        topology = await world.command("query-topology", format="tree")
        assert [node.id for node in topology.nodes] == ["machine"]
        assert topology.edges == []
        assert topology.text == "machine test\n"

    play(scenario)
