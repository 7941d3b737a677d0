"""Negotiation, what the server is, file descriptors, objects and guest memory."""

STORY = r"""
-> {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
<- {"return": {}}
-> {"execute": "query-version"}
<- {"return": {"qemu": {"major": "...", "minor": "...", "micro": "..."}, "package": "vfiod"}}
-> {"execute": "query-name"}
<- {"return": {"name": "vm1"}}
-> {"execute": "query-uuid"}
<- {"return": {"UUID": "0b0c6d7e-9a44-4d8e-8a44-1b3c7c1d2e99"}}
-> {"execute": "query-status"}
<- {"return": {"running": true, "status": "running"}}
-> {"execute": "query-commands"}
<- {"return": [{"name": "ccw-request"}, {"name": "ccw-halt"}, {"name": "ccw-clear"}, "..."]}
-> {"execute": "query-qmp-schema"}
<- {
  "return": [{"name": "ccw-request", "meta-type": "command", "arg-type": "CcwRequest", "ret-type": "CcwResult"}, "..."]
}
-> {
  "execute": "query-stats",
  "arguments": {"target": "vm", "providers": [{"provider": "vfiod", "names": ["devices", "mappings"]}]}
}
<- {
  "return": [{"provider": "vfiod", "stats": [{"name": "devices", "value": 0}, {"name": "mappings", "value": 0}]}]
}
-> {"execute": "trace-event-get-state", "arguments": {"name": "mapping_*"}}
<- {"return": [{"name": "mapping_made", "state": "disabled"}, {"name": "mapping_removed", "state": "disabled"}]}
-> {"execute": "trace-event-set-state", "arguments": {"name": "mapping_*", "enable": true}}
<- {"return": {}}
-> {"execute": "human-monitor-command", "arguments": {"command-line": "info status"}}
<- {"return": "running  yes\nstatus   running\n"}
// sent with it: memfd of 2097152 bytes
-> {"execute": "getfd", "arguments": {"fdname": "memory"}}
<- {"return": {"kind": "memfd"}}
-> {"execute": "query-fds"}
<- {
  "return": [
    {"owner": "session:...", "name": "memory", "kind": "memfd", "number": "..."},
    {"owner": "server", "name": "session:...", "kind": "socket", "number": "..."},
    {"owner": "server", "name": "/run/vfiod/vm1/qmp.sock", "kind": "listening-socket", "number": "..."}
  ]
}
-> {"execute": "object-add", "arguments": {"qom-type": "memory-backend-fd", "id": "ram0", "fd": "memory"}}
<- {"return": {}}
-> {"execute": "query-objects"}
<- {"return": [{"id": "ram0", "qom-type": "memory-backend-fd", "size": 2097152, "readonly": false, "used-by": []}]}
-> {"execute": "dma-map", "arguments": {"iova": 0, "size": 2097152, "memory-backend": "ram0"}}
<- {"return": {"iova": 0, "size": 2097152}}
-> {"execute": "query-dma"}
<- {"return": [{"iova": 0, "size": 2097152, "offset": 0, "readonly": false, "memory-backend": "ram0"}]}
-> {"execute": "dma-unmap", "arguments": {"iova": 0, "size": 2097152}}
<- {"return": {"size": 2097152}}
-> {"execute": "object-del", "arguments": {"id": "ram0"}}
<- {"return": {}}
// sent with it: eventfd
-> {"execute": "getfd", "arguments": {"fdname": "spare"}}
<- {"return": {"kind": "eventfd"}}
-> {"execute": "closefd", "arguments": {"fdname": "spare"}}
<- {"return": {}}
// sent with it: memfd of 4096 bytes
-> {"execute": "add-fd", "arguments": {"fdset-id": 1, "opaque": "guest memory"}}
<- {"return": {"fdset-id": 1, "fd": "...", "kind": "memfd"}}
-> {"execute": "query-fdsets"}
<- {"return": [{"fdset-id": 1, "fds": [{"fd": "...", "kind": "memfd", "opaque": "guest memory"}]}]}
-> {"execute": "remove-fd", "arguments": {"fdset-id": 1}}
<- {"return": {}}
"""
