"""A subchannel with a disk of fixed blocks behind it; then the end of the server."""

STORY = r"""
-> {
  "execute": "mdev-create",
  "arguments": {
    "parent": "fba",
    "type": "fba-ccw",
    "uuid": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e01",
    "parameters": {"file": "/run/vfiod/vm1/disk.img", "device-number": 512}
  }
}
<- {"return": {"uuid": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e01"}}
-> {
  "execute": "device_add",
  "arguments": {"driver": "vfio-ccw", "id": "disk0", "mdev": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e01"}
}
<- {"return": {}}
-> {"execute": "query-subchannel", "arguments": {"device": "disk0"}}
<- {
  "return": {
    "device": "disk0",
    "schib": "AAAAAACBAgCA...",
    "device-number": 512,
    "enabled": true,
    "channel-paths": [0],
    "status": {
      "summary": "no status (idle)",
      "words": ["no status (idle)"],
      "functions": [],
      "activity": [],
      "status": [],
      "device-status": [],
      "subchannel-status": [],
      "deferred-condition-code": 0,
      "ccw-address": 0,
      "residual-count": 0
    },
    "words": [
      "device 0200, enabled, interruption subclass 0",
      "channel paths 00; available 0x80, operational 0xff, last used 0x80",
      "status: no status (idle)"
    ],
    "pending": false,
    "waiting": 0,
    "can-halt": true,
    "requests": 0,
    "late": 0
  }
}
// sent with it: memfd of 1048576 bytes with 0320000100000000 at 4096
-> {"execute": "getfd", "arguments": {"fdname": "guest"}}
<- {"return": {"kind": "memfd"}}
-> {"execute": "dma-map", "arguments": {"iova": 0, "size": 1048576, "fd": "guest"}}
<- {"return": {"iova": 0, "size": 1048576}}
-> {"execute": "ccw-request", "arguments": {"device": "disk0", "orb-fields": {"cpa": 4096}}}
<- {
  "return": {
    "condition-code": 0,
    "meaning": "started",
    "irb": "AMBABwAAEAgM...",
    "decoded": {
      "summary": "ended normally",
      "words": [
        "ended normally",
        "channel end: the transfer is over",
        "device end: the device is ready again",
        "functions: start",
        "..."
      ],
      "functions": ["start"],
      "activity": [],
      "status": ["primary", "secondary", "status-pending"],
      "device-status": ["channel-end", "device-end"],
      "subchannel-status": [],
      "deferred-condition-code": 0,
      "ccw-address": 4104,
      "residual-count": 1
    }
  }
}
-> {"execute": "ccw-halt", "arguments": {"device": "disk0"}}
<- {"return": {"condition-code": 0, "meaning": "accepted: an interrupt will say when it is done"}}
-> {"execute": "ccw-clear", "arguments": {"device": "disk0"}}
<- {"return": {"condition-code": 0, "meaning": "accepted: an interrupt will say when it is done"}}
<- {
  "timestamp": "...",
  "event": "CCW_IO",
  "data": {
    "device": "disk0",
    "irb": "AAAQAQAAAAAA...",
    "decoded": {
      "summary": "cleared",
      "words": ["cleared", "functions: clear"],
      "functions": ["clear"],
      "activity": [],
      "status": ["status-pending"],
      "device-status": [],
      "subchannel-status": [],
      "deferred-condition-code": 0,
      "ccw-address": 0,
      "residual-count": 0
    },
    "solicited": true,
    "late": false,
    "seq": "..."
  }
}
-> {"execute": "query-crw", "arguments": {"device": "disk0"}}
<- {"return": []}
-> {"execute": "quit"}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "SHUTDOWN",
  "data": {"guest": false, "reason": "host-qmp-quit", "seq": "..."}
}
"""
