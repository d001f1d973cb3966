"""Servers for tests that are forked from a process which has begun to import SGLang, once for the whole run.

Every process of a server, three and more, first spends some twelve seconds of CPU on the imports at the head of
`sglang.launch_server`. `keeper.py` pays for them once; servers, and what these spawn, are forks of that state:

* **It is a state through which every process goes.** The keeper runs the head of that file as a spawned process does,
  and no other import of SGLang's, this project's or theirs; plugins, hooks and all the rest follow in each process.
* **What imports read of the environment is the same.** The keeper notes each variable that was asked for; a server, or
  a process that it spawns, for which one of these differs starts from nothing, and so it does for any variable that is
  not known to be read in Python alone (`environment.py`).
* **There is no thread, no child process and no open file** to be inherited (`keeper.py` refuses to go on with one), and
  random generators are seeded anew.

What is the keeper's, and would be each process's own: the seed of string hashes, the size of threads' stacks.
`tests/sglang_router_capture/test_forked.py` holds a forked server against one that started from nothing. A test asks
for such servers by `tests.forked_servers.client.serve`; where a server's start is the subject, or where one server is
evidence for others (`capture_server`, the soak), it does not.
"""
