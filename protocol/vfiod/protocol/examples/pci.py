"""A mediated PCI device: made, added, read, interrupted, reset, offered to a hypervisor, taken away."""

STORY = r"""
-> {"execute": "query-mdev-types"}
<- {
  "return": [
    {
      "parent": "primer",
      "type": "primer-pci",
      "name": "Primer",
      "description": "A small PCI device for learning and testing: registers, mappable memory, interrupts, DMA",
      "device-api": "vfio-pci",
      "available-instances": 1024,
      "parameters": {
        "memory": "bytes of BAR2's memory, a power of two, 4096 to 268435456; default 1048576",
        "vectors": "MSI vectors: 1, 2, 4, 8, 16 or 32; default 4",
        "msix-vectors": "MSI-X vectors: 0 to 64, 0: no such capability; default 8",
        "msix-resizable": "whether MSI-X vectors can be added while others are in use; default false",
        "granted-vectors": "MSI and MSI-X vectors that can really be had, to try a short host; default: all",
        "doorbell": "whether IRQ_RAISE, written with 1, is a doorbell (an ioeventfd of hypervisors); default false",
        "hot-unplug": "false: refuses to be destroyed between mdev-start and mdev-shutdown; default true"
      },
      "parent-attributes": {},
      "devices": []
    },
    "..."
  ]
}
-> {
  "execute": "mdev-create",
  "arguments": {
    "parent": "primer",
    "type": "primer-pci",
    "uuid": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00",
    "parameters": {"vectors": 2}
  }
}
<- {"return": {"uuid": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00"}}
-> {"execute": "device-list-properties", "arguments": {"typename": "vfio-pci"}}
<- {
  "return": [
    {
      "name": "host",
      "type": "str",
      "description": "Host address: [[DDDD:]BB:]DD.F, or a platform device's name."
    },
    {"name": "sysfsdev", "type": "str", "description": "The host device's directory in sysfs."},
    {
      "name": "group-fd",
      "type": "str",
      "description": "A file descriptor: a name given by getfd, or /dev/fdset/N."
    },
    "..."
  ]
}
-> {
  "execute": "device_add",
  "arguments": {"driver": "vfio-pci", "id": "nic0", "mdev": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00"}
}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "DEVICE_ADDED",
  "data": {"device": "nic0", "path": "/machine/peripheral/nic0", "seq": "..."}
}
-> {"execute": "mdev-start"}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "MDEV_STARTED",
  "data": {"uuid": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00", "vm": "0b0c6d7e-9a44-4d8e-8a44-1b3c7c1d2e99", "seq": "..."}
}
-> {"execute": "query-devices", "arguments": {"id": "nic0"}}
<- {
  "return": [
    {
      "id": "nic0",
      "path": "/machine/peripheral/nic0",
      "driver": "vfio-pci",
      "backend": "mdev",
      "host": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00",
      "mdev": {"parent": "primer", "type": "primer-pci", "...": "..."},
      "state": "running",
      "reset": true,
      "regions": 9,
      "irq-indexes": 5,
      "irq-kind": "none",
      "vendor-id": 4660,
      "device-id": 61709,
      "migratable": false,
      "share-fd": true,
      "fast-path": true,
      "on-request": "event",
      "requested": 0,
      "held-by": []
    }
  ]
}
-> {"execute": "query-topology", "arguments": {"format": "tree"}}
<- {
  "return": {
    "nodes": [
      {"id": "machine", "kind": "machine", "label": "machine vm1", "attributes": {}},
      {
        "id": "mdev:6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00",
        "kind": "space",
        "label": "mdev:6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00",
        "attributes": {}
      },
      {
        "id": "device:nic0",
        "kind": "device",
        "label": "nic0",
        "attributes": {"pci-id": "1234:f10d", "state": "running", "...": "..."}
      }
    ],
    "edges": [
      {"parent": "machine", "child": "mdev:6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00"},
      {"parent": "mdev:6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00", "child": "device:nic0"}
    ],
    "text": "machine vm1\n..."
  }
}
-> {"execute": "query-machine"}
<- {
  "return": {
    "seq": "...",
    "name": "vm1",
    "uuid": "0b0c6d7e-9a44-4d8e-8a44-1b3c7c1d2e99",
    "status": {"running": true, "status": "running"},
    "devices": ["..."],
    "irqs": ["..."],
    "objects": [],
    "containers": [],
    "address-spaces": ["mdev:6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00"],
    "mappings": [],
    "fdsets": [],
    "mdevs": ["6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00"],
    "sessions": ["..."]
  }
}
-> {"execute": "query-regions", "arguments": {"device": "nic0"}}
<- {
  "return": [
    {
      "device": "nic0",
      "region": 0,
      "name": "bar0",
      "size": 4096,
      "readable": true,
      "writable": true,
      "mappable": false,
      "mapped": false,
      "areas": []
    },
    "..."
  ]
}
-> {
  "execute": "region-write",
  "arguments": {"device": "nic0", "region": "bar0", "offset": 8, "size": 4, "value": 144}
}
<- {"return": {}}
-> {"execute": "region-read", "arguments": {"device": "nic0", "region": "bar0", "offset": 8, "size": 4}}
<- {"return": {"value": 12}}
-> {"execute": "region-map", "arguments": {"device": "nic0", "region": "bar2"}}
<- {"return": {"map-fd": 0, "offset": 0, "size": 1048576, "areas": [{"offset": 0, "size": 1048576}]}}
-> {"execute": "region-unmap", "arguments": {"device": "nic0", "region": "bar2"}}
<- {"return": {}}
-> {"execute": "query-irqs", "arguments": {"device": "nic0"}}
<- {
  "return": [
    {
      "device": "nic0",
      "index": 0,
      "name": "intx",
      "count": 1,
      "active": false,
      "flags": {"eventfd": true, "maskable": true, "automasked": true, "noresize": false},
      "reserved": false,
      "vectors": [],
      "fired": 0,
      "delivered": 0,
      "spurious": 0
    },
    "..."
  ]
}
-> {"execute": "irq-start", "arguments": {"device": "nic0", "index": "msi"}}
<- {"return": {"irqs": [{"device": "nic0", "index": 1, "vector": 0, "mode": "direct", "trigger-fd": 0}]}}
-> {"execute": "irq-trigger", "arguments": {"device": "nic0", "index": "msi", "vector": 0}}
<- {"return": {}}
-> {"execute": "irq-route", "arguments": {"device": "nic0", "index": "msi", "vector": 0, "number": 40}}
<- {"return": {}}
-> {"execute": "irq-stop", "arguments": {"device": "nic0", "index": "msi"}}
<- {"return": {}}
// sent with it: eventfd
-> {"execute": "getfd", "arguments": {"fdname": "line"}}
<- {"return": {"kind": "eventfd"}}
-> {
  "execute": "irq-start",
  "arguments": {"device": "nic0", "index": "intx", "mode": "relayed", "eventfds": [{"vector": 0, "trigger": "line"}]}
}
<- {"return": {"irqs": [{"device": "nic0", "index": 0, "vector": 0, "mode": "relayed"}]}}
-> {"execute": "irq-mask", "arguments": {"device": "nic0", "index": "intx"}}
<- {"return": {}}
-> {"execute": "irq-unmask", "arguments": {"device": "nic0", "index": "intx"}}
<- {"return": {}}
-> {"execute": "irq-trigger", "arguments": {"device": "nic0", "index": "intx"}}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "IRQ",
  "data": {"device": "nic0", "index": 0, "vector": 0, "fired": 1, "delivered": 1, "seq": "..."}
}
-> {"execute": "irq-eoi", "arguments": {"device": "nic0", "index": "intx"}}
<- {"return": {}}
-> {"execute": "device-reset", "arguments": {"id": "nic0"}}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "DEVICE_RESET",
  "data": {"device": "nic0", "method": "device", "seq": "..."}
}
-> {"execute": "query-hot-reset", "arguments": {"id": "nic0"}}
<- {
  "return": {
    "possible": false,
    "reason": "... failed with EOPNOTSUPP: a mediated device has no bus: use device-reset",
    "affected": []
  }
}
-> {"execute": "hot-reset", "arguments": {"id": "nic0"}}
<- {
  "error": {
    "class": "GenericError",
    "desc": "... failed with EOPNOTSUPP: a mediated device has no bus: use device-reset",
    "errno": "EOPNOTSUPP"
  }
}
-> {"execute": "system_reset"}
<- {"return": {}}
-> {
  "execute": "device-export-add",
  "arguments": {"id": "door0", "type": "vfio-user", "device": "nic0", "path": "/run/vfiod/vm1/nic0.sock"}
}
<- {"return": {}}
-> {"execute": "query-device-exports"}
<- {
  "return": [
    {
      "id": "door0",
      "type": "vfio-user",
      "device": "nic0",
      "state": "listening",
      "path": "/run/vfiod/vm1/nic0.sock",
      "attached": 0
    }
  ]
}
-> {"execute": "device-export-del", "arguments": {"id": "door0"}}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "DEVICE_EXPORT_DELETED",
  "data": {"id": "door0", "device": "nic0", "seq": "..."}
}
-> {"execute": "mdev-shutdown"}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "MDEV_SHUTDOWN",
  "data": {"uuid": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00", "vm": "0b0c6d7e-9a44-4d8e-8a44-1b3c7c1d2e99", "seq": "..."}
}
-> {"execute": "device_del", "arguments": {"id": "nic0"}}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "DEVICE_DELETED",
  "data": {"device": "nic0", "path": "/machine/peripheral/nic0", "released": true, "seq": "..."}
}
-> {"execute": "mdev-destroy", "arguments": {"uuid": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00"}}
<- {"return": {}}
<- {
  "timestamp": "...",
  "event": "MDEV_REMOVED",
  "data": {"uuid": "6f5f1c5e-52a5-4d8e-9a44-1b3c7c1d2e00", "parent": "primer", "reason": "destroyed", "seq": "..."}
}
"""
