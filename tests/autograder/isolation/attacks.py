"""Hostile answer files. Each is the honest wrong answer WRONG, and then the attack.

{secret} is a file that no answer may read, {outside} a folder in which none may write, {port} a
port of this machine at which somebody listens, {marker} a word by which a process is found later.
"""

WRONG = """
import torch

def mean_pool(x):
    return x.sum(1)

def num_bytes(rows, columns):
    return 8 * rows * columns

class Counter:
    def step(self, x):
        return x.sum()

def run_counter(xs):
    counter = Counter()
    return [counter.step(x) for x in xs]
"""

IN_CALL = """
def mean_pool(x):
    attack(x)
    return x.sum(1)
"""

# What an answer reads, it can only say in what it returns, prints or raises.
TELL = """
def tell(text):
    print(text)
    raise RuntimeError(str(text)[:3000])
"""

SYSTEM = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    return libc.syscall(*[ctypes.c_long(w) if isinstance(w, int) else w for w in words])
"""

# A frame of the worker's own making on every descriptor, the channel among them.
FRAME = """
import json, os, struct
def raw(header, rest=b""):
    text = json.dumps(header).encode()
    frame = struct.pack("<I", len(text)) + text + rest
    frame = struct.pack("<I", len(frame)) + frame
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, True)
            sent = 0
            while sent < len(frame):
                sent += os.write(fd, frame[sent:sent + 65536])
        except OSError:
            pass
"""

FORGERIES = {
    "exits with success at import": "import os\nos._exit(0)",
    "exits in a call": "import os\ndef attack(x):\n    os._exit(0)" + IN_CALL,
    "calls sys.exit(0) in a call": "import sys\ndef attack(x):\n    sys.exit(0)" + IN_CALL,
    "raises KeyboardInterrupt": "def attack(x):\n    raise KeyboardInterrupt" + IN_CALL,
    "raises GeneratorExit": "def attack(x):\n    raise GeneratorExit" + IN_CALL,
    "patches torch.allclose": "torch.allclose = lambda *a, **k: True\ntorch.equal = torch.allclose",
    "patches torch.testing": "torch.testing.assert_close = lambda *a, **k: None",
    "patches Tensor.mean": "torch.Tensor.mean = torch.Tensor.sum",
    "patches math.isclose": "import math\nmath.isclose = lambda *a, **k: True",
    "patches the grader's comparisons": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("autograder"):
        for key, value in list(vars(module).items()):
            if callable(value) and key in ("close", "equal", "number", "true"):
                setattr(module, key, lambda *a, **k: None)
""",
    "patches Student and grade": """
import sys
import autograder.student
autograder.student.Student._call = lambda self, name, f, a, k: torch.ones(1)
for module in list(sys.modules.values()):
    if hasattr(module, "PASSED"):
        for kind in ("WRONG_VALUE", "RAISED", "MUTATED"):
            if hasattr(module, kind):
                setattr(module, kind, "passed")
""",
    "returns a tensor that equals everything": """
class Equal(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return True if func.__name__ in ("allclose", "equal") else torch.tensor(True)
def mean_pool(x):
    return x.sum(1).as_subclass(Equal)
""",
    "returns a number that equals everything": """
class Any(int):
    __eq__ = lambda self, other: True
    __sub__ = __rsub__ = lambda self, other: 0
    __hash__ = int.__hash__
def num_bytes(rows, columns):
    return Any(8)
""",
    "returns an object whose pickle runs code": """
class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit(0)",)
def mean_pool(x):
    return Bomb()
""",
    "returns an object with a hostile repr": """
class Bomb:
    def __getattribute__(self, name):
        raise SystemExit(0)
    def __repr__(self):
        raise SystemExit(0)
def mean_pool(x):
    return Bomb()
""",
    "raises an error with a hostile text": """
class Bad(Exception):
    def __str__(self):
        raise SystemExit(0)
def mean_pool(x):
    raise Bad()
""",
    "raises the grader's own refusals": """
from autograder.refusals import Refusal
def mean_pool(x):
    raise Refusal("passed", "")
""",
    "raises errors named like the grader's": """
class OutOfTime(BaseException): pass
class StudentError(Exception): pass
def mean_pool(x):
    raise StudentError("passed")
def num_bytes(rows, columns):
    raise OutOfTime
""",
    "walks the frames for the expected value": """
import sys
def attack(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if isinstance(value, torch.Tensor) and value.shape == x.shape[::2]:
                return value
            if type(value).__name__ in ("Exercise", "Check", "CheckResult"):
                object.__setattr__(value, "points", 1000.0)
        frame = frame.f_back
def mean_pool(x):
    found = attack(x)
    return x.sum(1) if found is None else found
""",
    "searches memory for verdicts": """
import gc
def attack(x):
    for value in gc.get_objects():
        if type(value).__name__ in ("CheckResult", "ExerciseResult"):
            object.__setattr__(value, "status", "passed")
"""
    + IN_CALL,
    "searches memory for graders and solutions": """
import gc
for value in gc.get_objects():
    if type(value).__name__ == "function" and value.__name__ in ("by_sum", "test_values"):
        mean_pool = value
""",
    "answers its own calls on the channel": """
import json, os, struct
def attack(x):
    header = json.dumps({"m": "done", "r": 60, "changed": [], "states": [],
                         "besides": {"d": []}, "spent": 0, "tensors": []}).encode()
    frame = struct.pack("<I", len(header)) + header
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack("<I", len(frame)) + frame)
        except OSError:
            pass
"""
    + IN_CALL
    + "def num_bytes(rows, columns):\n    attack(0)\n    return 8\n",
    "writes garbage on the channel": """
import os
def attack(x):
    for fd in range(3, 64):
        try:
            os.write(fd, b"\\xff" * 4096)
        except OSError:
            pass
"""
    + IN_CALL,
    "asks the grader for what it does not offer": """
import gc
def attack(x):
    for peer in [o for o in gc.get_objects() if type(o).__name__ == "Peer"]:
        for name in ("load", "run", "eval", "__import__", [0, "__class__"], ["x", "y"]):
            try:
                peer.call(name, ["1"], {})
            except Exception:
                pass
"""
    + IN_CALL,
    "prints what a grader prints": """
import sys
print("passed", '{"status": "passed", "earned": 100}')
sys.__stdout__.write('{"results": []}\\n'); sys.__stdout__.flush()
""",
    "writes verdicts to standard output": """
import os
os.write(1, b'{"results": []}\\n'); os.write(2, b'{"results": []}\\n')
""",
    "shadows the grader's adapter": """
def run_counter(xs):
    return [x.sum() for x in torch.stack(list(xs)).cumsum(0)]
""",
    "changes its input so that the truth changes": """
def mean_pool(x):
    x.zero_()
    return x.sum(1)
""",
    "resizes its input": """
def mean_pool(x):
    x.resize_(0)
    return x.sum(1)
""",
    "sets torch's defaults": """
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.manual_seed(0)
torch.set_grad_enabled(False)
""",
    "replaces builtins": """
import builtins
builtins.isinstance = lambda *a: True
builtins.abs = lambda x: 0
builtins.all = lambda x: True
""",
    "enters a mode that changes every operation": """
from torch.utils._python_dispatch import TorchDispatchMode
class Same(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return torch.ones(())
Same().__enter__()
""",
    "catches signals": """
import signal
for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
    signal.signal(number, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0)
""",
}

READERS = {
    "reads a secret by its path": TELL
    + """
tell(open({secret!r}).read())
""",
    "reads the solutions": TELL
    + """
import pathlib
tell([p.read_text() for p in pathlib.Path({root!r}).rglob("*.py")])
""",
    "lists the course's folder": TELL
    + """
import os
tell([open(os.path.join({root!r}, n)).read() for n in os.listdir({root!r})])
""",
    "imports the catalogue": TELL
    + """
import importlib.util, sys
sys.path.insert(0, {root!r})
import misconceptions.toy as toy
tell(vars(toy))
""",
    "reads the environment": TELL
    + """
import os
tell(dict(os.environ))
""",
    "reads the parents' environments": TELL
    + """
import os
tell([open(f"/proc/{{p}}/environ").read() for p in ("self", os.getppid(), 1)])
""",
    "reads the parents' memory": TELL
    + """
import os
maps = open(f"/proc/{{os.getppid()}}/maps").read()
tell(open(f"/proc/{{os.getppid()}}/mem", "rb").read(100), maps)
""",
    "reads memory with process_vm_readv": TELL
    + """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
mine = ctypes.create_string_buffer(64)
local = Part(ctypes.addressof(mine), 64)
count = libc.process_vm_readv(os.getppid(), ctypes.byref(local), 1, ctypes.byref(local), 1, 0)
tell("secret-word" if count > 0 else "nothing")
""",
    "traces its parent": TELL
    + """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
tell("secret-word" if libc.ptrace(16, os.getppid(), 0, 0) == 0 else "nothing")
""",
    "reads through a link": TELL
    + """
import os
os.symlink({secret!r}, "/tmp/link-of-an-answer")
tell(open("/tmp/link-of-an-answer").read())
""",
    "reads through /proc/self/root": TELL
    + """
tell(open("/proc/self/root" + {secret!r}).read())
""",
    "runs cat": TELL
    + """
import subprocess
tell(subprocess.run(["cat", {secret!r}], capture_output=True).stdout)
""",
    "leaves a new user namespace": TELL
    + """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.unshare(0x10000000)
tell(open({secret!r}).read())
""",
}

WRITERS = {
    "writes a file": "open({outside!r} + '/written', 'w').write('x')",
    "appends to the secret": "open({secret!r}, 'a').write('x')",
    "writes at exit": """
import atexit
atexit.register(lambda: open({outside!r} + "/written", "w").write("x"))
""",
    "makes a folder": "import os\nos.mkdir({outside!r} + '/made')",
    "deletes a file": "import os\nos.unlink({secret!r})",
    "renames a file": "import os\nos.rename({secret!r}, {secret!r} + '.old')",
    "truncates a file": "import os\nos.truncate({secret!r}, 0)",
    "changes a mode": "import os\nos.chmod({secret!r}, 0o777)",
    "makes a pipe in the folder": "import os\nos.mkfifo({outside!r} + '/pipe')",
    "fills the disk": """
with open("/tmp/flood-of-an-answer", "wb") as file:
    for _ in range(10_000):
        file.write(bytes(2**20))
""",
    "writes to shared memory": "open('/dev/shm/of-an-answer', 'w').write('x')",
    "saves a tensor": "torch.save(torch.ones(3), {outside!r} + '/tensor.pt')",
}

TALKERS = {
    "connects": """
import socket
socket.create_connection(("127.0.0.1", {port}), timeout=2).sendall(b"hello")
""",
    "sends a datagram": """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("127.0.0.1", {port}))
""",
    "opens an abstract socket": """
import socket
socket.socket(socket.AF_UNIX).bind("\\0of-an-answer")
""",
    "connects by system call": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(41, 2, 1, 0)
assert fd >= 0
""",
    "downloads": """
import urllib.request
urllib.request.urlopen("http://127.0.0.1:{port}/").read()
""",
}

LINGERERS = {
    "forks a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
""",
    "forks by system call": """
import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(57) == 0:
    time.sleep(60)
""",
    "starts a process": "import subprocess\nsubprocess.Popen(['sleep', '61.{marker}'])",
    "becomes another program": "import os\nos.execv('/bin/sleep', ['sleep', '61.{marker}'])",
    "uses multiprocessing": """
import multiprocessing, time
multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
""",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "thread bomb": """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
""",
    "threads that work on": """
import threading
def burn():
    while True:
        pass
for _ in range(4):
    threading.Thread(target=burn, daemon=True).start()
""",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills everybody": "import os\nos.kill(-1, 9)",
    "kills process groups": "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
    "aborts": "import os\nos.abort()",
    "crashes in native code": "import ctypes\nctypes.string_at(0)",
    "never ends": "def attack(x):\n    while True:\n        pass" + IN_CALL,
    "never ends and catches everything": """
def attack(x):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""
    + IN_CALL,
    "sleeps in native code": "import ctypes\ndef attack(x):\n    ctypes.CDLL(None).sleep(60)"
    + IN_CALL,
    "memory bomb": "def attack(x):\n    hoard = [bytearray(2**28) for _ in range(200)]" + IN_CALL,
    "memory bomb of tensors": "def attack(x):\n    torch.ones(2**36)" + IN_CALL,
    "recursion": "def attack(x):\n    attack(x)" + IN_CALL,
    "prints without end": "def attack(x):\n    while True:\n        print('x' * 1000)" + IN_CALL,
    "returns a huge tensor": "def mean_pool(x):\n    return torch.ones(1).expand(2**38)",
    "returns a large tensor": "def mean_pool(x):\n    return torch.ones(2**27)",
    "returns a huge list": "def mean_pool(x):\n    return [0] * 10**8",
    "returns a list that holds itself": "a = []\na.append(a)\ndef mean_pool(x):\n    return a",
    "returns a deep list": """
def mean_pool(x):
    a = []
    for _ in range(100_000):
        a = [a]
    return a
""",
    "returns a huge integer": "def num_bytes(rows, columns):\n    return 7 ** 10_000_000",
    "returns a huge text": "def mean_pool(x):\n    return 'x' * 10**9",
    "raises a huge message": "def mean_pool(x):\n    raise ValueError('x' * 10**8)",
    "opens many files": "open_files = [open('/dev/null') for _ in range(10**5)]",
    "raises its limits": """
import resource
for what in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    resource.setrlimit(what, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
""",
    "leaves shared memory of System V": """
import ctypes
assert ctypes.CDLL(None).shmget(4711, 4096, 0o1666) >= 0
""",
}

KILLERS = {
    "limits its host's time": SYSTEM
    + "def attack(x):\n    call(302, os.getppid(), 0, (ctypes.c_ulong * 2)(1, 1), None)"
    + IN_CALL,
    "starves the workers that come after": SYSTEM
    + "def attack(x):\n    call(302, os.getppid(), 9, (ctypes.c_ulong * 2)(2**26, 2**26), None)"
    + IN_CALL,
    "makes its host wait": SYSTEM
    + "def attack(x):\n    call(314, os.getppid(), (ctypes.c_uint32 * 14)(56, 5), 0)"
    + IN_CALL,
    "signals its host by asynchronous input": """
import fcntl, os
def attack(x):
    for number in (19, 9):
        try:
            r, w = os.pipe()
            fcntl.fcntl(r, 10, number)
            fcntl.fcntl(r, 8, os.getppid())
            fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            os.write(w, b"x")
        except OSError:
            pass
"""
    + IN_CALL,
    "stays when its parent dies": SYSTEM
    + "def attack(x):\n    assert call(157, 1, 0, 0, 0, 0) < 0"
    + IN_CALL,
}

METADATA = {
    "changes a mode by a newer call": SYSTEM + "call(452, -100, {secret!r}.encode(), 0o777, 0)",
    "changes times": SYSTEM + "call(132, {secret!r}.encode(), None)",
    "changes an owner": SYSTEM + "call(94, {secret!r}.encode(), 1, 1)",
    "watches a folder": TELL
    + SYSTEM
    + """
fd = call(253)
call(254, fd, {outside!r}.encode(), 0xfff)
open({secret!r}) if False else None
tell(os.read(fd, 4096) if fd >= 0 else "nothing")
""",
}

BOMBS = {
    "returns many views of one number": """
def mean_pool(x):
    return [torch.zeros(1).expand(2**26) for _ in range(1000)]
""",
    "returns one tensor many times": """
def mean_pool(x):
    return [torch.zeros(2**16)] * 10**5
""",
    "asks with tensors of stride 0": FRAME
    + """
def attack(x):
    fact = ["uint8", [2**28], [0], False, 1]
    raw({"m": "call", "f": "x", "a": [], "k": {"d": []}, "tensors": [fact] * 12}, bytes(12))
"""
    + IN_CALL,
    "load says what changed": FRAME + 'raw({"m": "done", "r": None, "changed": [5]})',
    "load changes by a text": FRAME + 'raw({"m": "done", "r": None, "changed": [["a", 1]]})',
    "load has an odd dtype": FRAME + 'raw({"m": "done", "r": {"y": []}})',
    "load has an odd number": FRAME + 'raw({"m": "done", "r": {"i": "zz"}})',
    "load fails again": FRAME
    + 'raw({"m": "fail", "e": ["ValueError"], "s": "", "x": "", "again": []})',
    "load fails": FRAME + 'raw({"m": "fail", "e": ["ValueError"], "s": "boo", "x": ""})',
    "load exits": FRAME + 'raw({"m": "fail", "e": ["SystemExit"], "s": "0", "x": ""})',
    "load is refused oddly": FRAME
    + 'raw({"m": "done", "r": {"d": [["refused", 5], ["names", []]]}})',
    "load has a graph": FRAME + 'raw({"m": "done", "r": None, "graph": [1, [7], [9]]})',
    "load asks for gradients": FRAME + 'raw({"m": "vjp", "c": [], "g": {"y": []}})',
    "keys that collide": FRAME
    + """
raw({"m": "done", "r": {"d": [[k * (2**61 - 1), 0] for k in range(1, 60_000)]}})
""",
    "a source that is slow to read": "\n".join(["a = a;" * 40_000]),
}

VERBATIM = FORGERIES | KILLERS | BOMBS  # their braces are Python's
ALL = FORGERIES | READERS | WRITERS | METADATA | TALKERS | LINGERERS | KILLERS | BOMBS
