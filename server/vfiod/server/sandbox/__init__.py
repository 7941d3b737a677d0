"""What the process gives up before it serves: privileges, files, system calls.

``calls`` are the numbers, ``bpf`` makes a filter of a policy, ``policy`` is the policy (all three are values),
``landlock`` says which files stay reachable, ``process`` carries it out, ``limits`` looks at what the process was
given.
"""
