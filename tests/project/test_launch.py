"""The launch scripts: what they would run, and what they do when processes end, fail, or are told to stop.

Programs that a cluster has (gcloud, srun, ...) and the training itself are stubs here: small scripts that say what they
were asked, in a copy of launch/, whose .venv/bin/python is such a stub too.
"""
from __future__ import annotations

import importlib.util
import os
from pathlib import Path
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from loopformer import config as configs

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / 'launch').glob('*.sh'), ROOT / 'launch/slurm.sbatch'])
TRAINING = ['--config=a.py:b', '--workdir=/runs/it\'s "$(one)" & $NAME']
POD = ['--zone=us-west4-a', '--type=v5litepod-16']
CLUSTER = ['--image=here/image:1', '--volume=claim', '--nodes=4']
# Trains until SIGTERM, and then takes a while to save.
UNTIL_TOLD = 'trap "sleep 0.3; echo saved; exit 0" TERM; echo started $$; while true; do sleep 0.05; done'


def bash(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
  """A script under `root` has run."""
  return subprocess.run(['bash', *words], cwd=root, capture_output=True, text=True, timeout=60,
                        env=os.environ | environment)


def write_program(path: Path, text: str):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{text}\n')
  path.chmod(0o755)


@pytest.fixture
def copy(tmp_path):
  """(program) -> a folder with a copy of launch/, whose Python is the program."""
  def make(program: str) -> Path:
    shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
    write_program(tmp_path / '.venv/bin/python', program)
    return tmp_path
  return make


def wait_for(condition, seconds: float = 60):
  """What the condition returns once it holds. Fails after so many seconds."""
  end = time.time() + seconds
  while time.time() < end:
    if found := condition():
      return found
    time.sleep(0.05)
  raise AssertionError(f'waited {seconds} s in vain')


def alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  return True


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_hold_no_hyper_parameters(script):
  text = script.read_text()
  assert bash(ROOT, '-n', str(script)).returncode == 0
  assert text.splitlines()[1].startswith('#'), 'the second line says what the script is for'
  assert '--set' not in [word for line in text.splitlines() if not line.startswith('#') for word in line.split()]
  assert script.name == 'common.sh' or 'set -euo pipefail' in text or 'launch/setup.sh' in text


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not on the PATH')
def test_shellcheck_finds_nothing():
  done = subprocess.run(['shellcheck', '--external-sources', *map(str, SCRIPTS)], cwd=ROOT, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('words, expected', [
    (['launch/tpu_pod.sh', 'create', 'pod', *POD, '--spot', '--dry-run'],
     ['gcloud compute tpus tpu-vm create pod --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot '
      '--zone=us-west4-a']),
    (['launch/tpu_pod.sh', '--dry-run', 'create', 'pod', '--zone=us-east5-a', '--type=v5p-128', '--queued'],
     ['gcloud compute tpus queued-resources create pod --node-id=pod --accelerator-type=v5p-128 '
      '--runtime-version=v2-alpha-tpuv5 --zone=us-east5-a']),
    (['launch/tpu_pod.sh', '--dry-run', 'delete', 'pod', *POD, '--queued'],
     ['gcloud compute tpus queued-resources delete pod --force --quiet --zone=us-west4-a']),
    (['launch/tpu_pod.sh', '--dry-run', 'stop', 'pod', *POD],
     ["gcloud compute tpus tpu-vm ssh pod --worker=all '--command=loopformer/launch/tpu_host.sh stop' "
      '--zone=us-west4-a']),
    (['launch/tpu_pod.sh', '--dry-run', 'train', 'pod', *POD, '--mount=mount /runs', '--', '--config=a.py:b'],
     ["gcloud compute tpus tpu-vm describe pod '--format=value(state)' --zone=us-west4-a",
      'gcloud compute tpus tpu-vm create pod --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite '
      '--zone=us-west4-a',
      "gcloud compute tpus tpu-vm describe pod '--format=value(state)' --zone=us-west4-a",
      'mkdir -p build',
      'git archive --prefix=loopformer/ --output=build/loopformer.tar.gz HEAD',
      'gcloud compute tpus tpu-vm scp build/loopformer.tar.gz pod:loopformer.tar.gz --worker=all --zone=us-west4-a',
      "gcloud compute tpus tpu-vm ssh pod --worker=all '--command=tar -xzf loopformer.tar.gz && "
      "loopformer/launch/tpu_host.sh setup '\\''mount /runs'\\''' --zone=us-west4-a",
      "gcloud compute tpus tpu-vm ssh pod --worker=all '--command=loopformer/launch/tpu_host.sh run tpu-v5e "
      "--distributed --config=a.py:b' --zone=us-west4-a",
      'gcloud compute tpus tpu-vm delete pod --quiet --zone=us-west4-a']),
    (['launch/slurm.sbatch', '--dry-run', '--config=a.py:b'],
     ['srun --wait=120 launch/run.sh gpu --distributed --config=a.py:b']),
], ids=lambda value: ' '.join(value[:3]) if value[0].startswith('launch') else '')
def test_dry_runs_print_the_commands(words, expected):
  done = bash(ROOT, *words, PATH='/usr/bin:/bin')
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.splitlines() == expected


@pytest.mark.parametrize('words', [['launch/tpu_pod.sh', '--dry-run', 'run', 'pod', *POD, '--'],
                                   ['launch/slurm.sbatch', '--dry-run'],
                                   ['launch/local.sh', '--dry-run', '1', '--']], ids=lambda words: words[0])
def test_arguments_reach_the_program_as_they_are(words):
  """A shell that reads the printed command gets the same words, whatever signs are in them."""
  line = bash(ROOT, *words, *TRAINING).stdout.splitlines()[-1]
  found = shlex.split(line)
  if remote := [word for word in found if word.startswith('--command=')]:
    found = shlex.split(remote[0])  # the shell of the host reads it once more
  assert found[-2:] == TRAINING


@pytest.mark.parametrize('start, devices', [
    ('launch/local.sh 2 --devices=2', 4), ('launch/run.sh gpu --config', 8), ('sbatch --nodes=4', 32),
    ('launch/tpu_pod.sh train looped --zone=us-w', 16), ('launch/tpu_pod.sh train looped --zone=us-e', 64),
    ('launch/kubernetes.sh looped', 32)], ids=['local', 'node', 'slurm', 'v5e-16', 'v5p-128', 'kubernetes'])
def test_commands_of_the_readme_fit_their_devices(start, devices):
  """The configuration exists, and mesh and rows divide over so many devices."""
  lines = (ROOT / 'launch/README.md').read_text().replace('\\\n', ' ').splitlines()
  words = shlex.split(next(line for line in lines if line.startswith(start)))
  [path] = [word.removeprefix('--config=') for word in words if word.startswith('--config=')]
  config = configs.load(path, [words[i + 1] for i, word in enumerate(words) if word == '--set'])
  mesh, train = config.mesh, config.train
  assert mesh.data == -1 and devices % (mesh.fsdp * mesh.tensor) == 0
  assert train.batch % train.accumulate == 0
  assert train.batch // train.accumulate % (devices // mesh.tensor) == 0


def test_logs_of_a_run_in_a_bucket_stay_here():
  """And no folder is made that is named like the bucket."""
  done = subprocess.run(['launch/local.sh', '2', '--', '--workdir=gs://bucket/run'], cwd=ROOT, timeout=60,
                        env={**os.environ, 'PYTHON': 'true'})
  assert done.returncode == 0 and (ROOT / 'build/logs/process-1.log').exists() and not (ROOT / 'gs:').exists()


@pytest.mark.parametrize('words, message', [
    (['launch/local.sh', '2'], 'there is no --'),
    (['launch/local.sh', '2', '--', '--config=a.py'], '--workdir=FOLDER is missing'),
    (['launch/local.sh', '--', '--workdir=w'], 'the number of processes is missing'),
    (['launch/tpu_pod.sh', 'create', 'pod', '--zone=z'], '--type is missing'),
    (['launch/tpu_pod.sh', 'create', 'pod', '--zone=z', '--type=v9-8'], '--version is missing'),
    (['launch/tpu_pod.sh', 'paint', 'pod', *POD], 'there is no action paint'),
    (['launch/kubernetes.sh', 'run', *CLUSTER, '--'], 'give one of --gpus and --tpu'),
    (['launch/flags.sh', 'abacus'], 'choose from cpu, gpu'),
    (['launch/slurm.sbatch', '--config=a.py'], 'submit this file with sbatch'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_mistakes_are_named(words, message):
  done = bash(ROOT, *words)
  assert done.returncode != 0
  assert message in done.stderr


@pytest.mark.parametrize('options, command, chips', [
    (['--gpus=8'],
     ['launch/run.sh', 'gpu', '--coordinator=my-workers-0-0.my:8476', '--processes=4', '--process=$(INDEX)'],
     {'nvidia.com/gpu': 8}),
    (['--tpu=tpu-v5-lite-podslice:4x4'], ['launch/run.sh', 'tpu-v5e', '--distributed'], {'google.com/tpu': 4}),
    (['--tpu=tpu-v5p-slice:4x4x4', '--chips=2'], ['launch/run.sh', 'tpu-v5p', '--distributed'], {'google.com/tpu': 2}),
], ids=['gpu', 'v5e', 'v5p'])
def test_manifests(options, command, chips):
  yaml = pytest.importorskip('yaml')
  done = bash(ROOT, 'launch/kubernetes.sh', '--dry-run', 'my', *CLUSTER, *options, '--', *TRAINING)
  assert (done.returncode, done.stderr) == (0, '')
  manifest = yaml.safe_load(done.stdout)
  assert (manifest['kind'], manifest['metadata']['name']) == ('JobSet', 'my')
  assert manifest['spec']['failurePolicy']['maxRestarts'] == 100
  assert manifest['spec']['coordinator'] == {'replicatedJob': 'workers', 'jobIndex': 0, 'podIndex': 0}
  [workers] = manifest['spec']['replicatedJobs']
  job = workers['template']['spec']
  assert (job['parallelism'], job['completions'], job['backoffLimit']) == (4, 4, 0)
  pod = job['template']['spec']
  assert (pod['restartPolicy'], pod['terminationGracePeriodSeconds']) == ('Never', 120)
  [container] = pod['containers']
  assert container['image'] == 'here/image:1'
  assert container['command'] == command
  assert [word.replace('$$(', '$(') for word in container['args']] == TRAINING  # how Kubernetes reads $$(
  assert '$(one)' not in container['args'][1].replace('$$(one)', '')
  assert container['resources']['limits'] == chips
  assert container['volumeMounts'][0] == {'name': 'runs', 'mountPath': '/runs'}
  assert pod['volumes'][0] == {'name': 'runs', 'persistentVolumeClaim': {'claimName': 'claim'}}
  if options[0].startswith('--tpu'):
    accelerator, topology = options[0].removeprefix('--tpu=').split(':')
    assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': accelerator,
                                   'cloud.google.com/gke-tpu-topology': topology}


def flags_of(backend: str, **environment: str) -> tuple[str, str]:
  """(variable, value) of launch/flags.sh."""
  name, _, value = bash(ROOT, 'launch/flags.sh', backend, **environment).stdout.strip().partition('=')
  return name, value


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_this_jaxlib_knows_the_flags(backend):
  """XLA parses the flags of all open backends alike, and aborts at one that it does not know."""
  def start(flags):
    return subprocess.run([sys.executable, '-c', 'import jax; jax.devices()'], capture_output=True, text=True,
                          env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags})
  name, flags = flags_of(backend, XLA_FLAGS='')
  assert name == 'XLA_FLAGS' and flags
  assert start(flags).returncode == 0
  assert 'Unknown flag' in start(flags + ' --xla_no_such_flag=true').stderr


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
@pytest.mark.parametrize('backend', ['tpu', 'tpu-v5e', 'tpu-v5p'])
def test_this_libtpu_knows_the_flags(backend):
  """Asking for a topology starts libtpu, without a TPU."""
  name, flags = flags_of(backend, LIBTPU_INIT_ARGS='')
  assert name == 'LIBTPU_INIT_ARGS'
  ask = "from jax.experimental import topologies as t; t.get_topology_desc(platform='tpu', topology_name='v5e:4x4')"
  done = subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'LIBTPU_INIT_ARGS': flags,
                                          'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'})  # other tests may use it now
  assert done.returncode == 0, done.stderr


def test_flags_of_tpus_stay_out_of_xla_flags_and_the_users_come_last():
  assert flags_of('tpu-v5e', LIBTPU_INIT_ARGS='--mine=1')[1].endswith('=true --mine=1')
  assert flags_of('tpu-v5p')[0] == 'LIBTPU_INIT_ARGS'
  assert 'tpu' not in flags_of('gpu')[1]
  assert flags_of('gpu', XLA_FLAGS='--mine=1')[1].endswith(' --mine=1')


@pytest.mark.parametrize('program, status', [('exit 0', 0), ('exit 3', 3), ('kill -KILL $$', 137)])
def test_a_process_ends_as_its_program(copy, program, status):
  assert bash(copy(program), 'launch/run.sh', 'cpu').returncode == status


@pytest.mark.parametrize('program, status', [
    (UNTIL_TOLD, 75),
    ('echo started; exec sleep 60', 75),  # not listening yet: dies of the signal
    ('trap "exit 3" TERM; echo started; while true; do sleep 0.05; done', 3)])
def test_a_process_that_was_told_to_stop_asks_to_be_started_again(copy, program, status):
  process = subprocess.Popen(['bash', 'launch/run.sh', 'cpu', '--workdir=w'], cwd=copy(program), stdout=subprocess.PIPE,
                             text=True)
  assert process.stdout.readline().startswith('started')
  process.terminate()
  assert process.wait(60) == status
  assert ('saved' in process.stdout.read()) == ('saved' in program)


def local(root: Path, processes: int = 2) -> subprocess.Popen:
  """launch/local.sh has been started."""
  words = ['launch/local.sh', str(processes), '--devices=2', '--', '--config=a.py', f'--workdir={root}/run']
  # A background job is started with SIGINT ignored, and no script can trap what it was told to ignore.
  heard = ('import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); '
           'os.execvp("bash", ["bash", *sys.argv[1:]])')
  return subprocess.Popen([sys.executable, '-c', heard, *words], cwd=root, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_local_processes_are_one_jax(copy):
  """Every process is told of the others, and has its devices: JAX itself says so."""
  program = '''import jax, sys
options = dict(word[2:].split('=', 1) for word in sys.argv[3:])
jax.distributed.initialize(options['coordinator'], int(options['processes']), int(options['process']))
print(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(), options['config'])
'''
  root = copy(f'exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} "$@"')
  process = local(root)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert out == '0 2 2 4 a.py\n'
  assert (root / 'run/logs/process-1.log').read_text().splitlines()[-1] == '1 2 2 4 a.py'


@pytest.mark.parametrize('send, number', [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)],
                         ids=['kill', 'Ctrl-C'])
def test_local_passes_signals_on(copy, send, number):
  root = copy(UNTIL_TOLD)
  process = local(root, processes=3)
  logs = [root / f'run/logs/process-{i}.log' for i in (1, 2)]
  assert process.stdout.readline().startswith('started')
  wait_for(lambda: all(log.exists() and 'started' in log.read_text() for log in logs))
  send(process.pid, number)  # a terminal sends Ctrl-C to all processes of the group
  assert process.wait(60) == 0
  assert process.stdout.read() == 'saved\n'
  assert all('saved' in log.read_text() for log in logs)


def test_local_fails_when_one_process_does(copy):
  """The others would wait for it for ever."""
  root = copy('''case "$*" in
    *--process=1*) sleep 0.5; echo "broken here"; exit 3 ;;
    *) trap "" TERM; echo $$ > waiting; while true; do sleep 0.05; done ;;
  esac''')
  process = local(root)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 3
  assert 'process 1 failed with status 3' in err and 'broken here' in err
  assert not alive(int((root / 'waiting').read_text()))


@pytest.mark.parametrize('status, requeued', [(0, False), (3, False), (75, True)])
def test_slurm_goes_back_to_the_queue_after_a_signal(copy, status, requeued):
  root = copy('exit 0')
  write_program(root / 'bin/srun', f'echo "srun $*"; exit {status}')
  write_program(root / 'bin/scontrol', 'echo "scontrol $*"')
  done = bash(root, 'launch/slurm.sbatch', '--config=a.py', PATH=f'{root}/bin:{os.environ["PATH"]}',
              SLURM_SUBMIT_DIR=str(root), SLURM_JOB_ID='7')
  assert done.returncode == status
  assert done.stdout.splitlines()[0] == 'srun --wait=120 launch/run.sh gpu --distributed --config=a.py'
  assert ('scontrol requeue 7' in done.stdout) == requeued


# A cloud of one slice. `state` holds its state; `runs` what every run does: its status, and the state that it leaves.
GCLOUD = '''cd "$(dirname "$0")/.."
echo "$3 $4" >> asked
case "$*" in
  *" describe "*) cat state ;;
  *" create "*) echo READY > state ;;
  *" delete "*) : > state ;;
  *"tpu_host.sh run"*)
    read -r status state < runs
    sed -i 1d runs
    echo "$state" > state
    exit "$status" ;;
esac'''


@pytest.mark.parametrize('runs, status, asked', [
    ('0 READY', 0, ['create', 'run', 'delete']),
    ('255 PREEMPTED\n75 PREEMPTED\n0 READY', 0,
     ['create', 'run', 'delete', 'create', 'run', 'delete', 'create', 'run', 'delete']),
    ('255\n0 READY', 0, ['create', 'run', 'create', 'run', 'delete']),  # the slice is no more
    ('3 READY', 3, ['create', 'run']),
    ('75 READY', 75, ['create', 'run']),  # stopped by hand
], ids=['finishes', 'preempted twice', 'gone', 'fails', 'stopped'])
def test_training_on_a_pod_goes_on_after_preemptions(copy, runs, status, asked):
  root = copy('exit 0')
  write_program(root / 'bin/gcloud', GCLOUD)
  write_program(root / 'bin/git', 'exit 0')
  (root / 'state').write_text('')
  (root / 'runs').write_text(runs + '\n')
  done = bash(root, 'launch/tpu_pod.sh', 'train', 'pod', *POD, '--', '--config=a.py', POLL='0.01',
              PATH=f'{root}/bin:{os.environ["PATH"]}')
  assert done.returncode == status, done.stderr
  lines = (root / 'asked').read_text().splitlines()
  # setup copies and connects once, run connects once
  short = {'tpu-vm create': 'create', 'tpu-vm delete': 'delete', 'tpu-vm scp': 'run'}
  assert [short[line] for line in lines if line in short] == asked
  assert lines.count('tpu-vm ssh') == 2 * asked.count('run')


def test_a_host_stops_what_still_runs_there(copy):
  root = copy(UNTIL_TOLD)

  def host(*words):
    return subprocess.Popen(['bash', 'launch/tpu_host.sh', *words], cwd=root, stdout=subprocess.PIPE, text=True)
  first = host('run', 'cpu')
  process = int(first.stdout.readline().split()[1])
  second = host('run', 'cpu')
  assert first.wait(60) == 75
  assert first.stdout.read() == 'saved\n' and not alive(process)
  assert second.stdout.readline().startswith('started')
  stop = host('stop')
  assert (second.wait(60), stop.wait(60)) == (75, 0)
  assert not (root / 'run.pid').exists()
  assert host('stop').wait(60) == 0  # nothing runs
