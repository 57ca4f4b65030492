"""Whose folder it is: of several processes, on one machine or many, one at a time works in a folder, and a dead one keeps none.

Two ways at once, since neither is enough. `flock` is the business of the system: it ends with the process, at once, but it holds on one
machine, and on network disks often not at all. And a file `claim_HOST_PID_N` in the folder, which whoever has the folder touches every BEAT
seconds; it holds wherever the folder is seen. A process that wants the folder

1. puts its own file there;
2. looks what other such files there are;
3. if one of them is alive, takes its own away and has lost; else the folder is its own, and what the dead have left goes.

Two that come at the same moment both put before they look, so at least one of them sees the other: never do both win. Both may lose, and try
again after pauses of random length. Of a process on this machine it is known whether it lives; one elsewhere counts as dead after SILENCE
seconds without a beat, by the clock of the disk, and at once if it was this very job of Slurm, which has been started again since.
"""

import atexit
import contextlib
import itertools
import json
import os
import random
import re
import socket
import threading
import time
from pathlib import Path

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None

BEAT, SILENCE = 20, 180                 # seconds
HOST = re.sub(r'[^\w.-]', '-', socket.gethostname())
NAME = re.compile(r'claim_(?P<host>.+)_(?P<process>\d+)_\d+')
_numbers = itertools.count(1)


class Claim:
    """A folder that belongs to this process until it calls the Claim, or ends. Raises BlockingIOError if another process has the folder."""

    def __init__(self, folder):
        self.folder, self.lock = Path(folder), _locked(folder)
        self.file = self.folder / f'claim_{HOST}_{os.getpid()}_{next(_numbers)}'
        try:
            self.file.write_text(json.dumps({'host': HOST, 'process': os.getpid(), **_job()}))
            others = [name for name in claims_in(folder) if name != self.file.name]
            if alive := [name for name in others if is_alive(self.folder / name, self.file.stat().st_mtime)]:
                raise BlockingIOError(f'{folder} is in use: another process is training there, {told(self.folder / alive[0])}')
        except BaseException:
            self.let_go()
            raise
        for name in others:
            (self.folder / name).unlink(missing_ok=True)
        self.ended, self.owner = threading.Event(), os.getpid()
        threading.Thread(target=self.beat, name='claim', daemon=True).start()
        atexit.register(self)

    def __call__(self):
        if self.owner == os.getpid():                       # in a forked child it is still the parent's
            self.ended.set()
            atexit.unregister(self)
            self.let_go()
        self.owner = None

    def beat(self):
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):              # the disk may be away for a while
                os.utime(self.file)

    def let_go(self):
        self.file.unlink(missing_ok=True)
        if self.lock is not None:
            os.close(self.lock)

    def check(self):
        """Raise BlockingIOError if another process has taken the folder, since this one gave no sign of life for so long."""
        if not self.file.exists():
            raise BlockingIOError(f'{self.folder}: this process was silent for more than {SILENCE} seconds, and another one has gone on there')


def claim(folder, wait=False):
    """Keep other processes from claiming the folder, until this one ends or calls the Claim that is returned.

    If another process has claimed it, wait until it is free, or, by default, raise BlockingIOError, which says who it is.
    """
    for attempt in itertools.count(1):
        try:
            return Claim(folder)
        except BlockingIOError:
            if attempt == 3 and not wait:
                raise
            time.sleep(random.uniform(0.05, 0.3))


@contextlib.contextmanager
def claimed(folder):
    """Within this context no other process claims the folder; wait until the one that has it is done."""
    release = claim(folder, wait=True)
    try:
        yield
    finally:
        release()


def claims_in(folder):
    """Return the names of the claims that lie in the folder, of living and dead processes."""
    return sorted(name for name in os.listdir(folder) if NAME.fullmatch(name))


def beaten(file):
    """Return when the claim `file` was last touched, in seconds; 0 if it has been given back."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0


def is_alive(file, now):
    """Return whether the process that made the claim `file` is there, as far as can be told; `now` is the time, by the clock of the disk.

    Whose it is its name says, also where the process was killed before it wrote anything into it.
    """
    claim, job, maker = read_claim(file), _job(), NAME.fullmatch(file.name)
    if now - beaten(file) > SILENCE or job and claim.get('job') == job['job'] and claim.get('start', 0) < job['start']:
        return False
    if maker['host'] == HOST and os.name == 'posix':        # elsewhere to ask whether a process lives may end it
        try:
            os.kill(int(maker['process']), 0)
        except ProcessLookupError:
            return False
        except PermissionError:                             # it is there, and somebody else's
            return True
    return True


def read_claim(file):
    """Return what the claim `file` says, a dict: host, process, and the job of Slurm; {} while it is being written or taken away."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def told(file):
    """Return in words whose the claim `file` is, and when it last gave a sign of life."""
    claim, last = read_claim(file), time.localtime(beaten(file))
    job = f', Slurm job {claim["job"]}' if 'job' in claim else ''
    return (f'process {claim["process"]} on {claim["host"]}{job}, last sign of life {time.strftime("%Y-%m-%d %H:%M:%S", last)}' if claim
            else 'which has just begun')


def whose(folder, claimed):
    """Return in words whose the folder is now, or was when its process died; `claimed` is a folder on that disk that this process claims."""
    now = max((beaten(Path(claimed) / name) for name in claims_in(claimed)), default=time.time())
    claims = [Path(folder) / name for name in claims_in(folder)]
    alive = [file for file in claims if is_alive(file, now)]
    return f'in training: {told(alive[0])}' if alive else f'died: {told(claims[-1])}' if claims else 'stopped'


def _locked(folder):
    """Return a file that holds the lock of the system on the folder, None if it has none. Raises BlockingIOError if another process has it."""
    if fcntl is None:
        return None
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        last = sorted((Path(folder) / name for name in claims_in(folder)), key=beaten)[-1:]
        raise BlockingIOError(f'{folder} is in use: another process is training there' + ''.join(f', {told(file)}' for file in last)) from None
    except OSError:                     # some network disks refuse
        os.close(file)
        return None
    return file


def _job():
    """Return the job of Slurm that this process belongs to, and how often it was started again; {} outside of Slurm."""
    job = os.environ.get('SLURM_JOB_ID')
    return {'job': job, 'start': int(os.environ.get('SLURM_RESTART_COUNT', 0))} if job else {}
