"""Unix sockets that strangers connect to: made safely, and entered only by who may. For monitors and exports alike."""
