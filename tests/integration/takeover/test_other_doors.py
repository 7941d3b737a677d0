"""The bus, its events and the metrics end with a server, and are there again in the one that took its place."""

from __future__ import annotations

import contextlib
import http.client
import socket
from pathlib import Path

from vfiod.client.bus import Bus, EventReader
from vfiod.client.errors import RequestTimedOut
from vfiod.protocol.catalogue.monitor import EventsLost

from .conftest import House, until
from .test_replaced import get, primer, put


def doors(directory: Path) -> tuple[str, ...]:
    directory.chmod(0o700)  # the bus wants one that nobody else can enter
    return (
        *("--bus", f"ipc:{directory}/bus", "--events", f"ipc:{directory}/events"),
        *("--metrics", f"unix:{directory}/metrics"),
    )


def scraped(path: Path) -> str:
    """What a scraper reads there; empty: nobody listens yet, or not any more."""
    with contextlib.suppress(OSError, http.client.HTTPException), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.read().decode()
    return ""


def answers(bus: Bus) -> bool:
    """Whether a call is answered. One that was on its way to a server that ended is lost, and is asked again."""
    with contextlib.suppress(RequestTimedOut):
        return bus.query_name(timeout=1).name == "vm"
    return False


def test_clients_of_the_bus_of_events_and_of_metrics_find_the_new_server(house: House) -> None:
    arguments = doors(house.directory)
    house.first(*arguments)
    with (
        house.connect() as client,
        Bus(f"ipc:{house.directory}/bus") as bus,
        EventReader(f"ipc:{house.directory}/events") as events,
    ):
        primer(client)
        put(client, 0x04, 7)

        def heard() -> bool:
            """Whether an event comes. A subscription gives no sign of when it takes effect: events until one comes."""
            client.device_reset(id="n0")
            with contextlib.suppress(RequestTimedOut):
                events.get_now(timeout=0.1)
                return True
            return False

        def read_all() -> None:
            with contextlib.suppress(RequestTimedOut):
                while events.get_now(timeout=0).seq != client.query_machine().seq:
                    pass

        for taken in range(2):
            until(lambda: answers(bus))
            until(heard)
            until(lambda: 'vfiod_devices{vm="vm"} 1\n' in scraped(house.directory / "metrics"))
            read_all()
            last = client.query_machine().seq
            before = house.servers[-1]
            after = house.next(*arguments)
            assert before.ended() == 0, after.log()
            # The same clients, which have done nothing for it.
            until(lambda: answers(bus))
            put(client, 0x04, 8 + taken)
            value = bus.region_read(device="n0", region="bar0", offset=0x04, size=4).value
            assert value == get(client, 0x04) == (8 + taken) ^ 0xFFFF_FFFF
            until(lambda: 'vfiod_devices{vm="vm"} 1\n' in scraped(house.directory / "metrics"))
            # Events go on with their numbers: a reader of all of them knows how many it has missed.
            client.device_reset(id="n0")
            got: list[int] = []

            def numbered(got: list[int] = got, last: int = last) -> bool:
                client.device_reset(id="n0")
                with contextlib.suppress(RequestTimedOut):
                    event = events.get_now(timeout=0.1)
                    if isinstance(event.data, EventsLost):
                        got.extend(range(event.data.first_seq, event.data.last_seq + 1))
                        event = events.get_now()
                    assert event.seq is not None
                    got.append(event.seq)
                return got != [] and got[-1] > last

            until(numbered)
            assert got == list(range(got[0], got[-1] + 1))
            assert got[0] <= last + 1


def test_a_server_that_names_no_doors_opens_none(house: House) -> None:
    """They are options of each server: what is not named ends with the one before."""
    house.first(*doors(house.directory))
    with house.connect() as client:
        primer(client)
        until(lambda: scraped(house.directory / "metrics") != "")
        before = house.servers[-1]
        house.next()
        assert before.ended() == 0
        assert get(client, 0x00) == 0xF10D_0001
        assert scraped(house.directory / "metrics") == ""
        with Bus(f"ipc:{house.directory}/bus") as bus:
            assert not answers(bus)


def test_what_cannot_be_opened_besides_takes_nothing_along(house: House) -> None:
    """Found by failing system calls: the new server ended, and with it every device that it had just taken over."""
    first = house.first()
    nowhere = house.directory / "nowhere"
    with house.connect() as client:
        primer(client)
        put(client, 0x04, 7)
        doors = (
            "--pidfile",
            f"{nowhere}/pid",
            "--metrics",
            f"unix:{nowhere}/metrics",
            "--jsonrpc",
            f"unix:{nowhere}/j",
        )
        second = house.next(*doors)
        assert first.ended() == 0, second.log()
        until(lambda: "Serving vm" in second.log())
        assert get(client, 0x04) == 7 ^ 0xFFFF_FFFF
        assert second.process.poll() is None
        complaints = [line for line in second.log().splitlines() if "could not be opened besides" in line]
        assert len(complaints) == 3 and all(str(nowhere) in line for line in complaints), second.log()
