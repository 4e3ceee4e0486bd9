"""A real SLURM on this machine: a controller and two nodes in one folder, stopped on exit of the context."""

import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from tests.forked import free_port

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
DAEMONS = ("slurmctld", "slurmd", "munged")
# daemons of two test processes share this machine's cgroups, which are named by node and job
PREFIX = f"t{os.getpid()}n"
NODES = (f"{PREFIX}1", f"{PREFIX}2")
FINAL = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED"}
CGROUP_V1 = Path("/sys/fs/cgroup/freezer").is_dir()
CONFIGURATION = """
ClusterName=toy
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=1800
SlurmdTimeout=300
SlurmdParameters=config_overrides
NodeName={prefix}[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=4 RealMemory=1000
PartitionName=main Nodes={prefix}[1-2] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes={prefix}[1-2] State=UP PriorityTier=10 PreemptMode=OFF
"""
CGROUP = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
"""


def unavailable() -> str | None:
    """Return why SLURM can never run here, or None."""
    if os.geteuid():
        return "SLURM's daemons need root"
    if not all(map(shutil.which, DAEMONS)) and not shutil.which("apt-get"):
        return "SLURM is not installed, and there is no apt-get"
    return None


def install() -> None:
    """Install SLURM's packages if they are missing; fail if that fails."""
    if all(map(shutil.which, DAEMONS)):
        return
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-q", *command],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"SLURM cannot be installed: {done.stderr[-500:]}"


class Cluster(ExitStack):
    """The SLURM daemons and a user's commands; all files are in `root`."""

    def __init__(self, root: Path):
        super().__init__()
        self.root, self.jobs = root, []
        self.slurmd: dict[str, subprocess.Popen] = {}
        self.env = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
        for folder in ("state", "disk", *(f"{kind}/{node}" for kind in ("spool", "disks") for node in NODES)):
            (root / folder).mkdir(parents=True)
        ports = [free_port() for _ in range(3)]
        # as on clusters, a signal to a step reaches only its tasks (cgroup), not their child processes
        proctrack = "cgroup" if CGROUP_V1 else "linuxproc"
        (root / "slurm.conf").write_text(
            CONFIGURATION.format(root=root, ports=ports, proctrack=proctrack, prefix=PREFIX)
        )
        if CGROUP_V1:
            (root / "cgroup.conf").write_text(CGROUP)
        # each node resolves both names, which jobs get from `scontrol show hostnames`
        (root / "hosts").write_text(Path("/etc/hosts").read_text() + f"\n127.0.0.1 {' '.join(NODES)}\n")
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o400)

    def start(self) -> "Cluster":
        root = self.root
        munged = ["munged", "--foreground", "--force", f"--key-file={root}/munge.key", f"--socket={root}/munge.socket"]
        munged += [f"--{name}-file={root}/munged.{name}" for name in ("pid", "log", "seed")]
        self._daemon(munged)
        self._wait(lambda: (root / "munge.socket").exists(), "munged")
        self._daemon(["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_slurmd(node)
        self.wait_until_idle()
        return self

    def start_slurmd(self, node: str) -> None:
        root = self.root  # its folder `disk` is another one on each node
        mounts = f"mount --bind {root}/hosts /etc/hosts; mount --bind {root}/disks/{node} {root}/disk"
        start = f"{mounts}; hostname {node}; exec slurmd -D -N {node}"
        self.slurmd[node] = self._daemon(["unshare", "--uts", "--mount", "sh", "-c", start])

    def kill_slurmd(self, node: str) -> None:
        self.slurmd[node].kill()
        self.slurmd[node].wait()

    def wait_until_idle(self) -> None:
        """Wait until both nodes are idle; nodes that a test left dead or down come back."""
        for node, slurmd in list(self.slurmd.items()):
            if slurmd.poll() is not None:
                self.start_slurmd(node)
        self.output("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME")
        idle = ["sinfo", "--noheader", "--Node", "--partition", "main", "--states", "idle"]
        self._wait(lambda: len(self.output(*idle).splitlines()) == len(NODES), "two idle nodes")

    def _daemon(self, command: list[str]) -> subprocess.Popen:
        process = subprocess.Popen(
            command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.callback(process.wait)
        self.callback(process.terminate)
        return process

    def __exit__(self, *error) -> bool | None:
        self.cancel_all()
        return super().__exit__(*error)

    def cancel_all(self) -> None:
        """End the jobs of a test at once."""
        while self.jobs:
            job = self.jobs.pop()
            subprocess.run(["scancel", job], env=self.env, capture_output=True)
            subprocess.run(["scancel", "--signal=KILL", "--full", job], env=self.env, capture_output=True)
        self._wait(lambda: not self.output("squeue", "--noheader"), "the end of all jobs", fail=False)

    def _wait(self, condition, what: str, seconds: float = 60, fail: bool = True) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                assert not fail, f"{what}: not reached in {seconds} s; see {self.root}"
                return
            time.sleep(0.1)

    def output(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout

    # ------------------------------------------------------------------------------------ a user

    def submit(self, script: Path, *options: str) -> str:
        """Return the id of a new job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(script)], env=self.env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def signal(self, job: str, *options: str) -> None:
        subprocess.run(["scancel", *options, job], env=self.env, check=True, capture_output=True)

    def describe(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`: JobState, ExitCode, Restarts, ..."""
        fields = self.output("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in fields if "=" in word)

    def start_requeued(self, job: str) -> None:
        """Start a requeued job now; SLURM would wait two minutes after the end of its last process."""
        time.sleep(3)  # a node rejects a job that it ended in the same second: "Job credential revoked"
        while self.describe(job).get("JobState") == "PENDING":
            self.output("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(1)

    def wait_for(self, job: str, *states: str, seconds: float = 180) -> dict[str, str]:
        """Wait until a job is in one of `states`, by default a final one; return its description."""
        targets = set(states) or FINAL
        self._wait(lambda: self.describe(job).get("JobState") in targets, f"job {job}: {targets}", seconds)
        return self.describe(job)
