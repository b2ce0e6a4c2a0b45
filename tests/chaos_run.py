"""The program, started again and again without importing it anew: each start is a process's child.

Lines of standard input are starts, JSON of "arguments", "log", "environment" and "limit", the
largest file that it may write, or null. Each is answered by the child's number, and, when it has
ended, by its exit code.
"""

import atexit
import json
import os
import resource
import signal
import sys
import traceback


def start(arguments, log, environment, limit):
    """In the child: what the console script does, from its first line on."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.argv[1:] = arguments
    code = 70
    try:
        main.run()
    except SystemExit as error:
        code = error.code
        atexit._run_exitfuncs()  # as the interpreter would: of several processes, JAX's farewell
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    from mlip_jax import main
    from mlip_jax.training import evaluation, verb  # noqa: F401

    evaluation.write_report = lambda *_: "none"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.close(0)
            start(**json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
