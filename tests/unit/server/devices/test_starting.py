"""irq-start, irq-stop, irq-route: what is set up in which order, what is refused; failing changes nothing.

Rules are those of behaviour.md, section 4.
"""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.catalogue.interrupts import IrqModeChanged
from vfiod.protocol.errors import CommandError, DeviceNotFound, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.mdev.parent import IrqInfo

PAIR = [{"vector": 0, "trigger": "t", "resample": "r"}]


async def direct(world: Any) -> tuple[Any, Any]:
    bells = world.bell("t"), world.bell("r")
    await world.command("irq-start", device="n0", eventfds=PAIR)
    return bells


def test_an_intx_with_a_resample_eventfd_is_direct(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        trigger, resample = await direct(world)
        assert rig.say() == ["intx trigger eventfd", "intx unmask eventfd"]
        rig.irqs.set_line(True)
        assert trigger.rung() == 1  # with no turn of vfiod's loop
        info = await world.irq()
        assert (info.fired, info.delivered) == (None, None)
        assert [(v.mode, v.fired, v.delivered) for v in info.vectors] == [("direct", None, None)]
        rig.irqs.set_line(False)
        resample.ring()
        await world.settle()  # the rig's own watch, not vfiod's: it is the kernel here
        assert not rig.irqs._masked

    play(scenario)


def test_the_direct_mode_asked_for_by_name_gets_both_eventfds(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        reply = await world.command("irq-start", device="n0", mode="direct")
        assert (reply.irqs[0].trigger_fd, reply.irqs[0].resample_fd) == (0, 1)
        trigger, resample = world.attached
        rig.irqs.set_line(True)
        assert trigger.rung() == 1
        rig.irqs.set_line(False)
        resample.ring()
        await world.settle()
        assert not rig.irqs._masked

    play(scenario)


def test_a_hypervisor_without_irqfd_asks_again_for_the_relayed_mode(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        trigger, _ = await direct(world)
        rig.irqs.set_line(True)
        assert trigger.rung() == 1
        rig.say()
        await world.command("irq-start", device="n0", mode="relayed")
        assert rig.say() == ["intx mask none", "intx unmask -1", "intx trigger eventfd", "intx unmask none"]
        await world.settle()
        assert trigger.rung() == 1  # still asserted: unmasking fired it again, now through vfiod
        assert (await world.irq()).vectors[0].state == "pending"
        await world.command("irq-start", device="n0", mode="direct")
        assert trigger.rung() == 1
        assert (await world.irq()).vectors[0].mode == "direct"

    play(scenario)


def test_starting_the_same_again_is_harmless(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0")
        [first] = world.attached
        rig.irqs.set_line(True)
        await world.settle()
        rig.say()
        reply = await world.command("irq-start", device="n0")
        assert rig.say() == []
        assert reply.irqs[0].trigger_fd == 0
        assert first.rung() == 1
        [again] = world.attached
        rig.irqs.set_line(False)
        await world.command("irq-eoi", device="n0", index="intx")
        rig.irqs.set_line(True)
        await world.settle()
        assert again.rung() == 1  # the same eventfd

    play(scenario)


def test_msi_is_direct_and_each_vector_has_its_eventfd(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        reply = await world.command("irq-start", device="n0", index="msi", vectors=[0, 1, 3])
        assert [(i.vector, i.mode, i.trigger_fd) for i in reply.irqs] == [
            (0, "direct", 0),
            (1, "direct", 1),
            (3, "direct", 2),
        ]
        [request] = rig.log
        assert request.count == 4
        assert request.fds[2] == -1
        rig.irqs.message(3)
        assert [bell.rung() for bell in world.attached] == [0, 0, 1]
        assert world.machine.device("n0").info().irq_kind == "msi"

    play(scenario)


def test_one_kind_at_a_time(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0")
        rig.say()
        await world.command("irq-start", device="n0", index="msi")
        assert rig.say() == ["intx mask none", "intx disable", "msi trigger eventfd"]
        assert not (await world.irq("intx")).active
        await world.command("irq-start", device="n0", index="intx")
        assert rig.say() == ["msi disable", "intx trigger eventfd"]
        assert world.told(IrqModeChanged) == []  # irq-start said so itself

    play(scenario)


def test_vectors_within_the_block_are_changed_alone_and_beyond_it_all_are_signalled(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0", index="msi", vectors=[0, 1])
        first = world.attached
        rig.log.clear()
        await world.command("irq-start", device="n0", index="msi", vectors=[1], mode="relayed")
        assert [(r.start, r.count) for r in rig.log] == [(1, 1)]
        rig.irqs.message(1)
        await world.settle()
        assert [bell.rung() for bell in first] == [0, 1]
        rig.log.clear()
        await world.command("irq-start", device="n0", index="msi", vectors=[3])
        assert rig.say() == ["msi disable", "msi trigger eventfd"]
        assert [bell.rung() for bell in first] == [1, 1]  # an interrupt may have been lost: signalled once
        assert [v.vector for v in (await world.irq("msi")).vectors] == [0, 1, 3]

    play(scenario)


def test_vectors_are_stopped_one_by_one_and_with_the_last_the_index(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0", index="msi", vectors=[0, 1])
        rig.say()
        await world.command("irq-stop", device="n0", index="msi", vectors=[1])
        assert rig.say() == ["msi trigger -1"]
        await world.command("irq-stop", device="n0", index="intx")  # not active: nothing to stop
        await world.command("irq-stop", device="n0", index="msi", vectors=[0, 1])
        assert rig.say() == ["msi disable"]
        assert world.machine.device("n0").info().irq_kind == "none"

    play(scenario)


def test_irq_stop_without_a_device_stops_all(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add("n0")
        await world.add("n1")
        for device in ("n0", "n1"):
            await world.command("irq-start", device=device)
        await world.command("irq-stop")
        assert [world.machine.device(d).info().irq_kind for d in ("n0", "n1")] == ["none", "none"]
        assert (await world.command("irq-start")).irqs == []  # machine complete: no platform device

    play(scenario)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (
            "irq-start",
            {"index": "err"},
            "Interrupt index err of device 'n0' belongs to vfiod: it becomes the event DEV",
        ),
        ("irq-start", {"index": "req"}, "Interrupt index req of device 'n0' belongs to vfiod: .* DEVICE_REQUESTED"),
        ("irq-start", {"index": "msix"}, "has no msix: it has no such capability"),
        ("irq-start", {"index": "foo"}, "no interrupt index 'foo'; it has indexes 0 to 4: intx, msi, msix, err, req"),
        ("irq-start", {"index": 9}, "no interrupt index 9"),
        ("irq-start", {"index": -1}, "no interrupt index -1"),
        ("irq-start", {"vectors": [1]}, "Interrupt index intx of device 'n0' has 1 vectors: there is no vector 1"),
        ("irq-start", {"index": "msi", "vectors": [0, 0]}, "Parameter 'vectors' names vector 0 twice"),
        ("irq-start", {"vectors": [0], "eventfds": [{"vector": 1, "trigger": "t"}]}, "name different vectors"),
        ("irq-start", {"eventfds": [{"vector": 0, "trigger": "zz"}]}, r"eventfds\[0\].trigger.*'zz' not found"),
        ("irq-start", {"eventfds": [{"vector": 0, "trigger": "m"}]}, "fd 'm' is a memfd, expected eventfd"),
        ("irq-start", {"eventfds": [{"vector": 0, "trigger": "t", "resample": "t"}]}, "names fd 't' twice"),
        (
            "irq-start",
            {"index": "msi", "eventfds": [{"vector": 0, "trigger": "t", "resample": "r"}]},
            "msi of device 'n0' is edge triggered: a resample eventfd",
        ),
        ("irq-start", {"first-number": 1, "routes": []}, "'first-number' and 'routes' exclude each other"),
        (
            "irq-start",
            {"index": "msi", "vectors": [0, 1], "first-number": 2**32 - 1},
            "'first-number' expects at most 4294967294 for 2 vectors, not 4294967295",
        ),
        (
            "irq-start",
            {"routes": [{"index": "msi", "number": 1}]},
            "names vector 0 of index 'msi', which is not being started: this starts intx",
        ),
        ("irq-mask", {"index": "msi"}, "msi of device 'n0' cannot be masked or unmasked: it is not MASKABLE"),
        ("irq-unmask", {"index": "msi"}, "msi of device 'n0' cannot be masked or unmasked: it is not MASKABLE"),
        ("irq-mask", {"index": "intx"}, "Cannot mask vector 0 of intx of device 'n0': it has no trigger"),
        ("irq-mask", {"index": "req"}, "belongs to vfiod"),
        ("irq-eoi", {"index": "msi"}, "msi of device 'n0' is edge triggered: there is nothing to complete"),
        ("irq-eoi", {"index": "err"}, "belongs to vfiod"),
        ("irq-trigger", {"index": "req"}, "belongs to vfiod"),
        ("irq-stop", {"index": "req"}, "belongs to vfiod"),
        ("irq-stop", {"index": "intx", "vectors": [4]}, "there is no vector 4"),
        ("irq-stop", {"vectors": [0]}, "Parameter 'index' is missing"),
        ("irq-route", {"index": "err", "number": 1}, "belongs to vfiod"),
        ("irq-route", {"index": "intx", "vector": 1, "number": 1}, "there is no vector 1"),
    ],
)
def test_what_is_refused(play: Any, command: str, arguments: dict[str, Any], words: str) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        world.bell("t")
        world.bell("r")
        world.names.receive([(await memfd()).duplicate()])
        world.names.name("m")
        with pytest.raises(InvalidArgument, match=words):
            await world.command(command, device="n0", **arguments)
        assert rig.say() == []
        assert world.names.look("t") is not None  # a command that fails leaves the names
        assert world.attached == []

    held: list[FileDescriptor] = []

    async def memfd() -> FileDescriptor:
        held.append(FileDescriptor(os.memfd_create("m")))
        return held[-1]

    async def whole(world: Any) -> None:
        try:
            await scenario(world)
        finally:
            for fd in held:
                fd.close()

    play(whole)


def test_arguments_of_one_device_need_the_device(play: Any) -> None:
    async def scenario(world: Any) -> None:
        with pytest.raises(InvalidArgument, match="Parameter 'device' is missing: 'index' is of one device"):
            await world.command("irq-start", index="intx")
        with pytest.raises(InvalidArgument, match="Parameter 'device' is missing"):
            await world.command("irq-stop", index="intx")
        with pytest.raises(DeviceNotFound, match="Device 'zz' not found"):
            await world.command("irq-start", device="zz")

    play(scenario)


def test_no_pin_no_intx(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await world.add(prepare=lambda rig: rig.irq.update({0: IrqInfo(0)}))
        with pytest.raises(InvalidArgument, match=r"there is no vector 0|it has no interrupt pin"):
            await world.command("irq-start", device="n0")

    play(scenario)


def test_a_host_that_grants_fewer_says_how_many_and_the_former_interrupt_runs_on(play: Any) -> None:
    async def scenario(world: Any) -> None:
        world.rigs.granted = 3
        rig = await world.add()
        await world.command("irq-start", device="n0")
        [bell] = world.attached
        with pytest.raises(
            OperationFailed, match="4 vectors were asked for, the host has 3: 2 are available"
        ) as caught:
            await world.command("irq-start", device="n0", index="msi", vectors=[0, 1, 2, 3])
        assert caught.value.errno == "ENOSPC"
        assert world.machine.device("n0").info().irq_kind == "intx"
        rig.irqs.set_line(True)
        await world.settle()
        assert bell.rung() == 1

    play(scenario)


# --- failing anywhere changes nothing -----------------------------------------------------------------


async def relayed_intx(world: Any) -> None:
    world.bell("t0")
    await world.command("irq-start", device="n0", eventfds=[{"vector": 0, "trigger": "t0"}])


async def direct_intx(world: Any) -> None:
    await direct(world)


async def masked_intx(world: Any) -> None:
    await relayed_intx(world)
    await world.command("irq-mask", device="n0", index="intx")


async def two_messages(world: Any) -> None:
    await world.command("irq-start", device="n0", index="msi", vectors=[0, 1], mode="relayed")


async def nothing(world: Any) -> None:
    pass


TARGETS = [
    {"index": "intx", "mode": "relayed"},
    {"index": "intx", "mode": "direct"},
    {"index": "intx", "eventfds": [{"vector": 0, "trigger": "n1", "resample": "n2"}]},
    {"index": "msi", "vectors": [1, 2]},
    {"index": "msi", "vectors": [0], "mode": "direct"},
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"to-{t['index']}-{t.get('mode', 'default')}-{len(t)}")
@pytest.mark.parametrize("former", [nothing, relayed_intx, direct_intx, masked_intx, two_messages])
def test_a_set_irqs_that_fails_anywhere_restores_the_former_interrupts(play: Any, former: Any, target: Any) -> None:
    """The k-th SET_IRQS of the change fails, for every k there is; each time all must be as before."""

    async def scenario(world: Any) -> None:
        rig = await world.add()
        await former(world)
        device = world.machine.device("n0")
        for failing in range(20):
            world.bell("n1")
            world.bell("n2")
            before = device.irq_infos(), [fd.name for fd in device.fds()]
            kernel = rig.irqs.kind, rig.irqs._masked, len(rig.irqs._vectors), rig.irqs._unmask is not None
            left = [failing]

            def refuse(request: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(errno.EIO, "not this one")

            rig.fail_set_irqs = refuse
            try:
                await world.command("irq-start", device="n0", **target)
            except OperationFailed as error:
                assert "EIO" in str(error)
            else:
                assert left[0] >= 0, "a failure was swallowed"
                break
            finally:
                rig.fail_set_irqs = lambda request: None
            assert (device.irq_infos(), [fd.name for fd in device.fds()]) == before
            assert (rig.irqs.kind, rig.irqs._masked, len(rig.irqs._vectors), rig.irqs._unmask is not None) == kernel
            assert world.names.look("n1") is not None
            assert world.told(DeviceError, IrqModeChanged) == []
        else:
            pytest.fail("it never succeeded")

    play(scenario)


def test_interrupts_still_work_after_every_failure(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        trigger = world.bell("t")
        await world.command("irq-start", device="n0", eventfds=[{"vector": 0, "trigger": "t"}])
        for failing in range(4):
            left = [failing]

            def refuse(request: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(errno.EIO, "not this one")

            rig.fail_set_irqs = refuse
            with pytest.raises(OperationFailed):
                await world.command("irq-start", device="n0", mode="direct")
            rig.fail_set_irqs = lambda request: None
            rig.irqs.set_line(True)
            await world.settle()
            assert trigger.rung() == 1
            rig.irqs.set_line(False)
            await world.command("irq-eoi", device="n0", index="intx")
            assert not rig.irqs._masked

    play(scenario)


def test_when_the_way_back_fails_too_nothing_is_active_and_everybody_is_told(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await world.command("irq-start", device="n0")

        def refuse(request: Any) -> None:
            if not request.is_disable:
                raise OSError(errno.EIO, "never again")

        rig.fail_set_irqs = refuse
        with pytest.raises(
            CommandError, match=r"could not be set up again .*: it has no interrupt now, irq-start it again"
        ):
            await world.command("irq-start", device="n0", mode="direct")
        assert world.machine.device("n0").info().irq_kind == "none"
        assert rig.irqs.kind is None
        assert len(world.told(DeviceError)) == 1
        assert [event.kind for event in world.told(IrqModeChanged)] == ["none"]
        rig.fail_set_irqs = lambda request: None
        await world.command("irq-start", device="n0")

    play(scenario)


def test_too_many_eventfds_for_one_reply_are_refused_before_anything(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add(prepare=lambda rig: rig.irq.update({1: IrqInfo(256)}))
        with pytest.raises(InvalidArgument, match="do not fit one reply, which carries at most 253 fds"):
            await world.command("irq-start", device="n0", index="msi", vectors=list(range(254)))
        assert rig.say() == []

    play(scenario)


# --- routes ------------------------------------------------------------------------------------------


def test_a_changed_route_sets_the_direct_mode_up_again_and_completes_once(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await direct(world)
        await world.command("irq-route", device="n0", index="intx", number=16)
        rig.say()
        await world.command("irq-route", device="n0", index="intx", number=16)
        assert rig.say() == []  # unchanged: nothing
        await world.command("irq-route", device="n0", index="intx", number=17)
        assert rig.say() == [
            "intx mask none",
            "intx unmask -1",
            "intx trigger eventfd",
            "intx unmask eventfd",
            "intx unmask none",
            "intx unmask none",
        ]
        assert (await world.irq()).vectors[0].number == 17
        assert world.told(IrqModeChanged) == []

    play(scenario)


def test_a_disabled_route_only_tears_the_direct_mode_down(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await direct(world)
        await world.command("irq-route", device="n0", index="intx", number=16)
        await world.command("irq-route", device="n0", index="intx")
        assert (await world.irq()).vectors[0].mode == "relayed"
        assert [(e.mode, e.reason) for e in world.told(IrqModeChanged)] == [("relayed", "its route was disabled")]
        await world.command("irq-route", device="n0", index="intx", number=18)
        assert (await world.irq()).vectors[0].mode == "direct"
        assert rig.irqs._unmask is not None

    play(scenario)


def test_a_route_that_cannot_be_set_up_is_as_before(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        await direct(world)
        await world.command("irq-route", device="n0", index="intx", number=16)
        once = [True]

        def refuse(request: Any) -> None:
            if once.pop() if once else False:
                raise OSError(errno.EIO, "no")

        rig.fail_set_irqs = refuse
        with pytest.raises(OperationFailed):
            await world.command("irq-route", device="n0", index="intx", number=17)
        [vector] = (await world.irq()).vectors
        assert (vector.number, vector.mode) == (16, "direct")

    play(scenario)


@pytest.mark.parametrize("routed", [True, False], ids=["direct", "without a route"])
def test_a_route_whose_completion_fails_is_as_before(play: Any, routed: bool) -> None:
    """Section 4: "one EOI is issued in case one was missed"; when the kernel refuses it, all is as it was."""

    async def scenario(world: Any) -> None:
        rig = await world.add()
        trigger, resample = await direct(world)
        await world.command("irq-route", device="n0", index="intx", number=16)
        if not routed:
            await world.command("irq-route", device="n0", index="intx")
        before = await world.irq()
        rig.say()
        told = len(world.told(IrqModeChanged))
        steps = iter(range(100))

        def refuse(request: Any) -> None:
            # The EOI is the step after the new set-up: the sixth from the direct mode and from the relayed.
            if next(steps) == last:
                raise OSError(errno.EIO, "no")

        last = 5 if routed else 4
        rig.fail_set_irqs = refuse
        with pytest.raises(OperationFailed, match="EIO"):
            await world.command("irq-route", device="n0", index="intx", number=17)
        assert next(steps) > last, "it came to the EOI"
        rig.fail_set_irqs = lambda request: None
        after = await world.irq()
        assert [(v.mode, v.number) for v in after.vectors] == [(v.mode, v.number) for v in before.vectors]
        assert len(world.told(IrqModeChanged)) == told
        # And it works: it fires, is completed, and can be routed once more.
        rig.irqs.set_line(True)
        await world.settle()
        assert trigger.rung() == 1
        rig.irqs.set_line(False)
        resample.ring()
        await world.settle()
        assert not rig.irqs._masked
        await world.command("irq-route", device="n0", index="intx", number=18)
        assert [(v.mode, v.number) for v in (await world.irq()).vectors] == [("direct", 18)]

    play(scenario)


def test_a_route_of_a_message_is_recorded(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await world.add()
        reply = await world.command("irq-start", device="n0", index="msi", vectors=[0, 1], first_number=40)
        assert [one.number for one in reply.irqs] == [40, 41]
        rig.say()
        await world.command("irq-route", device="n0", index="msi", vector=1, number=50)
        assert rig.say() == []
        assert [v.number for v in (await world.irq("msi")).vectors] == [40, 50]

    play(scenario)
