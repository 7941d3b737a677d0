"""Devices of the kernel: a group passed, a hot reset. Run in the kernel lab, where their addresses are others."""

STORY = r"""
// sent with it: /dev/vfio/vfio
-> {"execute": "getfd", "arguments": {"fdname": "container"}}
<- {"return": {"kind": "vfio-container"}}
// sent with it: /dev/vfio/26
-> {"execute": "getfd", "arguments": {"fdname": "group"}}
<- {"return": {"kind": "vfio-group"}}
-> {
  "execute": "device_add",
  "arguments": {
    "driver": "vfio-pci",
    "id": "nic1",
    "host": "0000:03:00.0",
    "group-fd": "group",
    "container-fd": "container"
  }
}
<- {"return": {}}
-> {"execute": "device_add", "arguments": {"driver": "vfio-pci", "id": "nic2", "host": "0000:03:00.1"}}
<- {"return": {}}
-> {"execute": "query-hot-reset", "arguments": {"id": "nic1"}}
<- {
  "return": {
    "possible": true,
    "affected": [
      {"address": "0000:03:00.0", "group": 26, "held-as": "nic1"},
      {"address": "0000:03:00.1", "group": 26, "held-as": "nic2"}
    ]
  }
}
-> {"execute": "hot-reset", "arguments": {"id": "nic1"}}
<- {
  "return": {
    "possible": true,
    "affected": [
      {"address": "0000:03:00.0", "group": 26, "held-as": "nic1"},
      {"address": "0000:03:00.1", "group": 26, "held-as": "nic2"}
    ]
  }
}
<- {"timestamp": "...", "event": "DEVICE_RESET", "data": {"device": "nic1", "method": "hot", "seq": "..."}}
<- {"timestamp": "...", "event": "DEVICE_RESET", "data": {"device": "nic2", "method": "hot", "seq": "..."}}
-> {"execute": "device_del", "arguments": {"id": "nic2"}}
<- {"return": {}}
<- {"timestamp": "...", "event": "DEVICE_DELETED", "data": {"device": "nic2", "...": "...", "released": true}}
-> {"execute": "device_del", "arguments": {"id": "nic1"}}
<- {"return": {}}
<- {"timestamp": "...", "event": "DEVICE_DELETED", "data": {"device": "nic1", "...": "...", "released": true}}
"""
