"""Every published configuration as text: its fields, its parameters, and how they divide over four devices."""
import difflib
import os
from pathlib import Path
import re

import jax
import pytest

from experiments.configs import loopformer as paper
from loopformer import config as configs, sharding
from loopformer.model import parameter_count
from loopformer.roles import Role
from tests import parts

FOLDER = Path(__file__).parents[1] / 'golden'
UPDATE = 'UPDATE_GOLDEN'
FSDP = 4
CONFIGS = Path(__file__).parents[2] / 'experiments/configs'
ARGUMENTS = {
    'act': ['', 'mano,tau=0.001'],
    'ccdd': ['cpu', 'cpu,kind=moe,source=corrupted,times=apart', 'gpu,kind=mmdit,encoder=tokens,noise=flow',
             'paper,drop=0.1'],
    'loopformer': [f'{size},kind={kind}' + (',ee=1' if ee else '') for size in ('tiny', 'small', 'paper')
                   for kind in paper.KINDS for ee in (0, 1) if not ee or kind in ('base_loop', 'tmlt')]
                  + ['p_hop', 'pointers,kind=tmlt,ee=1'],
    'algoformer': ['cpu', 'cpu,kind=looped', 'cpu,kind=stacked', 'large', 'cpu,task=autoregression', 'cpu,task=chain',
                   'cpu,task=autoregression,bound=contracted'],
    'cot_or_loop': ['cpu', 'cpu,kind=loop,steps=4,inject=1', 'cpu,kind=thought,task=word,steps=3',
                    'cpu,task=edit,internalise=100', 'cpu,kind=timed,task=arithmetic', 'gpu,task=dnf,kind=loop',
                    'gpu,task=colouring', 'paper,task=word,steps=16', 'paper,kind=loop,task=connectivity'],
    'huginn': ['cpu', 'small', 'paper', 'cpu,ramp=100'],
    'intra_layer': ['cpu,map=4211', 'small', 'large', 'cpu,block=2,inject=1', 'cpu,position=alibi', 'cpu,position=ape'],
    'latent_thoughts': ['p_hop', 'addition', 'igsm', 'assignment', 'assignment_code', 'edit_distance', 'lcs', 'markov',
                        'p_hop,kind=middle', 'p_hop,size=paper,loops=6', 'p_hop,layers=4,loops=1,cosine=10,period=2'],
    'leaderboard': ['cpu', 'cpu,system=huginn,task=p_hop', 'cpu,system=loopus,start=runs/decoder', 'small,system=ouro',
                    'small,system=diffusion', 'cpu,system=middle,loops=2,width=32'],
    'length_generalization': ['cpu', 'cpu,task=copy', 'paper,task=multiplication', 'cpu,loops=fixed', 'cpu,inject=0'],
    'linear_icl': ['', 'predict=weights'],
    'looped_icl': ['cpu', 'cpu,grow=1', 'paper,function=sparse', 'paper,function=tree', 'cpu,kind=stacked,layers=4'],
    'loopus': ['cpu', 'cpu,start=runs/pretrained', 'cpu,arm=ungated,start=runs/pretrained',
               'cpu,arm=base,start=runs/pretrained'],
    'masked_diffusion': ['cpu', 'cpu,loops=4,consistency=0.1,time=1,noise=cosine', 'cpu,kind=ar', 'cpu,task=text',
                         'gpu', 'paper', 'cpu,task=parity', 'cpu,task=ab,kind=ar', 'gpu,task=s5', 'gpu,task=countdown'],
    'mor': ['tiny', 'tiny,kind=token', 'tiny,kind=token,balance=free,form=paper', 'tiny,kind=random',
            'tiny,kind=recursive', 'tiny,kind=recursive,sharing=sequence,layers=6', 'tiny,kind=vanilla',
            'tiny,memory=shared', 'tiny,auxiliary=1,router=mlp', 'tiny,z=0.001,gate=open', 'tiny,kind=token,z=0.001',
            '135m', '360m', '360m,recursions=4,memory=compact',
            '730m', '1.7b'],
    'melt': ['cpu', 'cpu,phase=transition,base=runs/melt/base',
             '1.4b,phase=distill,base=runs/melt/base,start=runs/melt/transition',
             'gpu,phase=transition,base=runs/melt/base,gate=mean,chunk=64'],
    'ouro': ['tiny', 'pointers', 'pointers,gate=prospective', 'mano', 'multi_hop', '1.4b', '2.6b'],
    'pondernet': ['', 'mano,rate=0.2'],
    'padded': ['cpu', 'cpu,task=ab,untied=1', 'cpu,task=connectivity,fillers=n^2', 'cpu,loops=log,lengths=doubling',
               'cpu,mask=1', 'gpu', 'gpu,task=connectivity,fillers=512'],
    'parcae': ['cpu', 'cpu,inject=concat', 'cpu,ramp=100', '140m', '1300m', '140m,kind=transformer', '350m',
               '350m,kind=rdm'],
    'plt': ['tiny', 'tiny,kind=r1', 'tiny,kind=clp', 'tiny,kind=share', 'tiny,kind=seq,loops=3',
            'tiny,gate=hidden,mix=learned', 'loopcoder'],
    'quickstart': ['text', 'pointers'],
    'relay': ['cpu', 'cpu,kind=vanilla,inject=1', 'cpu,task=all,kind=chain', 'gpu,task=lis,relay=0.5',
              'paper,task=all,kind=tuned,start=runs/relay/chain,chains=runs/relay/merged.jsonl'],
    'shift': ['p_hop', 'text,first=0', 'markov,moments=reset,rewarm=100'],
    'timestep': ['cpu', 'cpu,kind=lt', 'cpu,kind=legacy', 'cpu,kind=table', 'ed60', 'lm'],
}
VARIANTS = [(file, argument) for file, arguments in ARGUMENTS.items() for argument in arguments]


def name_of(file: str, argument: str) -> str:
  return re.sub(r'\W+', '_', f'{file} {argument}'.replace('kind=', '').replace('ee=1', 'ee')).strip('_')


def config_of(file: str, argument: str):
  return configs.load(f'{CONFIGS / file}.py' + (f':{argument}' if argument else ''))


def text_of(config) -> str:
  """Configuration, parameter count, and a line for each parameter; shapes alone, nothing is allocated."""
  lines = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(parts.shapes(config.model)):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    partition = tuple(sharding.spec(Role(), leaf.shape, {'fsdp': FSDP, 'tensor': 1}))
    split = f'axis {partition.index("fsdp")}' if partition else 'whole'
    lines.append(f'{where} {leaf.dtype}{list(leaf.shape)} {split}')
  count = f'parameters: {parameter_count(config.model):,} (with their split over fsdp={FSDP})'
  return '\n'.join([configs.describe(config), '', count, *lines, ''])


@pytest.mark.parametrize('file, argument', VARIANTS, ids=[name_of(*v) for v in VARIANTS])
def test_golden(file, argument, tmp_path, monkeypatch):
  path = FOLDER / f'{name_of(file, argument)}.txt'
  monkeypatch.chdir(tmp_path)  # where a teacher's configuration lies, which is read
  for folder in re.findall(r'\bbase=([^,]+)', argument):
    configs.save(config_of(file, argument.split(',')[0]), folder)
  config = config_of(file, argument)
  configs.check(config)
  text = text_of(config)
  if os.environ.get(UPDATE):
    path.write_text(text)
  old = path.read_text() if path.exists() else ''
  changes = '\n'.join(difflib.unified_diff(old.splitlines(), text.splitlines(), path.name, 'now', lineterm='', n=0))
  assert text == old, (f'{changes}\nIf this is meant: {UPDATE}=1 python -m pytest tests/experiments/test_golden.py, '
                       'and commit tests/golden with the change')


def test_golden_files_are_of_configurations_that_exist():
  assert {path.stem for path in FOLDER.iterdir()} == {name_of(*variant) for variant in VARIANTS}


def test_every_configuration_file_has_a_golden_one():
  others = {'__init__', 'finetune'}  # which has the model of a work folder (tests/experiments/test_finetune.py)
  assert {path.stem for path in CONFIGS.glob('*.py')} - others == set(ARGUMENTS)


@pytest.mark.parametrize('file, argument', VARIANTS, ids=[name_of(*v) for v in VARIANTS])
def test_a_configuration_survives_its_file(file, argument, tmp_path):
  config = config_of(file, argument)
  configs.save(config, tmp_path)
  again = configs.read(tmp_path)
  assert configs.flatten(again) == configs.flatten(config)
  assert jax.tree.map(lambda leaf: leaf.shape, parts.shapes(again.model)) == jax.tree.map(
      lambda leaf: leaf.shape, parts.shapes(config.model))


def formula(kind: str, layers: int, width: int, hidden: int, vocab: int, length: int) -> int:
  """Parameters by the paper's architecture (sheet, section 2)."""
  block = 3 * width * width + width * width + 2 * width * hidden
  embed = 256 * width + width + width * width + width
  total = vocab * width + length * width + width
  if kind in ('base', 'base_loop'):
    return total + layers * (block + 2 * width)
  return total + layers * (block + 4 * width * width + 4 * width) + (2 if kind == 'loopformer' else 1) * embed


@pytest.mark.parametrize('kind, layers', [('loopformer', 3), ('tmlt', 3), ('base_loop', 3), ('base', 24)])
def test_parameter_count_of_the_published_sizes(kind, layers):
  model = paper.get_config(f'paper,kind={kind}').model
  expected = formula(kind, layers, width=2048, hidden=5120, vocab=50304, length=1024)
  assert parameter_count(model) == expected


@pytest.mark.parametrize('argument, expected', [
    ('140m', 144_323_136), ('370m', 388_003_328), ('770m', 776_655_680), ('1300m', 1_338_591_744),
    ('140m,kind=transformer', 143_141_184), ('370m,kind=transformer', 385_903_104),
    ('770m,kind=transformer', 773_375_040), ('1300m,kind=transformer', 1_333_868_544),
    ('100m,kind=rdm', 114_242_560), ('350m,kind=rdm', 382_765_056), ('350m', 378_558_464)])
def test_parameter_count_of_parcae(argument, expected):
  """The paper's tables, to the unit: of its Transformer setup, and of the one with recurrent depth models (section 2).

  For Parcae at 100M it prints the other's number.
  """
  assert parameter_count(config_of('parcae', argument).model) == expected


@pytest.mark.parametrize('file, argument, expected', [
    ('huginn', 'paper', 3_564_976_800),
    ('intra_layer', 'small', 1024 * 128 + 4 * (16 * 128 ** 2 + 2 * 128) + 128),
    ('intra_layer', 'small,map=4211', 1024 * 128 + 4 * (16 * 128 ** 2 + 2 * 128) + 128),
    ('intra_layer', 'large', 32_000 * 768 + 8 * (16 * 768 ** 2 + 2 * 768) + 768)])
def test_parameter_count_by_formula(file, argument, expected):
  assert parameter_count(config_of(file, argument).model) == expected


@pytest.mark.parametrize('kind, low, high', [('lt', 46.4e6, 46.6e6), ('tmlt', 49.5e6, 49.7e6)])
def test_parameter_count_of_the_timestep_encoded_language_models(kind, low, high):
  """46.5M and 49.6M by the repository's run names."""
  assert low < parameter_count(config_of('timestep', f'lm,kind={kind}').model) < high


def test_depth_is_no_parameter():
  counts = {loops: parameter_count(config_of('latent_thoughts', f'p_hop,loops={loops}').model) for loops in (1, 3, 12)}
  assert len(set(counts.values())) == 1 and 49_000 < counts[1] < 51_000
