"""The documentation site: its pages cover what there is, and it builds without a warning and without the network."""
import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.parts import ROOT


def load(name: str):
  """A file of docs/site, which is no package."""
  spec = importlib.util.spec_from_file_location(f'site_{name}', ROOT / f'docs/site/{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


hooks = load('hooks')


def test_every_configuration_and_report_has_a_page():
  models = hooks.models()
  configs = {path.stem for path in (ROOT / 'experiments/configs').glob('*.py')} - {'__init__'}
  told = [name for model in models.values() for name in model['configs']]
  assert sorted(told) == sorted(configs)
  reports = {path.parent.name for path in (ROOT / 'experiments/reports').glob('*/README.md')}
  shown = [name for model in models.values() for name in model['reports']]
  assert sorted(shown) == sorted(reports)
  assert all(model['title'] and set(model) == {'title', 'configs', 'reports', 'equation'} for model in models.values())
  written = tomllib.loads((ROOT / 'docs/site/models.toml').read_text())
  assert all(model['equation'].strip() for model in written.values()) and set(written) <= set(models)


def test_pages_of_models_have_equation_command_and_figures():
  made = hooks.pages()
  for name, model in hooks.models().items():
    page = made[f'models/{name}.md']
    assert model['equation'].strip() in page
    for config in model['configs']:
      assert f'## Configuration `{config}`' in page and 'python -m experiments.main' in page
    for folder in model['reports']:
      report = (ROOT / 'experiments/reports' / folder / 'README.md').read_text()
      for picture in re.findall(r'!\[[^\]]*\]\(([^)]+)\)', report):
        assert f'](../reports/{folder}/{picture})' in page and f'reports/{folder}/{picture}' in hooks.pictures()


def test_links_lead_where_the_site_has_the_page_and_else_name_the_file():
  source = ROOT / 'docs/plan.md'
  assert hooks.relinked('[r](../experiments/reports/plan/README.md)', source, 'plan.md') == '[r](models/plan.md)'
  assert hooks.relinked('[r](../experiments/reports/README.md)', source, 'plan.md') == '[r](models/index.md)'
  assert hooks.relinked('[launch](../launch/README.md)', source, 'plan.md') == 'launch (`launch/README.md`)'
  assert hooks.relinked('[x](memories.md#a) [y](#b) [z](https://a.org)', source, 'plan.md') == (
      '[x](memories.md#a) [y](#b) [z](https://a.org)')
  report = ROOT / 'experiments/reports/dial/README.md'
  assert hooks.relinked('![d](dial.png) [t](table.md)', report, 'models/loopformer.md') == (
      '![d](../reports/dial/dial.png) t (`experiments/reports/dial/table.md`)')
  assert hooks.demoted('# a\n```\n# b\n```\n## c') == '## a\n```\n# b\n```\n### c'


def test_links_of_the_docs_lead_to_files():
  """On GitHub, where no hook rewrites them."""
  for page in (ROOT / 'docs').glob('*.md'):
    for target in re.findall(r'\]\(([^()\s]+)\)', page.read_text()):
      if not re.match(r'[a-z]+:|#', target):
        assert (page.parent / target.partition('#')[0]).exists(), (page.name, target)


def test_lists_and_code_are_what_they_are_on_github():
  """A list needs an empty line before it, and code within one eight spaces."""
  code = 'a:\n- b\n  c\n- d:\n\n      python -m x \\\n        --y\n- e\n\n  f\n\nx\n- g\n\n    h\n'
  assert hooks.spaced(code) == (
      'a:\n\n- b\n  c\n- d:\n\n        python -m x \\\n          --y\n\n- e\n\n  f\n\nx\n\n- g\n\n    h\n')
  for as_it_is in ('- a\n- b\n\n- c', '```\nx\n- y\n```\n', 'a\n\n    code\n', '- a\n      b\n'):
    assert hooks.spaced(as_it_is) == as_it_is


def test_parts_of_the_design_are_in_the_api():
  """Each that its table of sockets names."""
  table = re.search(r'(?ms)^\| socket \|.*?\n\n', (ROOT / 'docs/design.md').read_text())[0]
  named = set(re.findall(r'`([A-Z]\w+)`', table))
  shown = {node.name for names in hooks.API.values() for name in names
           for path in [ROOT / (name.replace('.', '/') + '.py')] if path.is_file()
           for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
  assert len(named) > 100 and named <= shown, named - shown
  for folder in ('tasks', 'papers'):
    assert set(hooks.modules(folder)) <= {name for names in hooks.API.values() for name in names}


def test_limits_are_the_reports_own_words():
  page = hooks.limits_page()
  assert re.search(r'^## Not measured', (ROOT / 'experiments/reports/ouro/README.md').read_text(), re.M)
  assert '*Not measured here*' in page and '*What to doubt*' in page
  assert 'Claim: repeat the early layers. At our size: did not reproduce.' in page
  for name, model in hooks.models().items():
    if set(model['reports']) & set(hooks.claims()):
      assert f'(models/{name}.md)' in page, name
  assert hooks.doubts('# A\nx\n\n## Doubts\nd\n\n## Not\ny\n\n- Not done: z') == '*Doubts*\n\nd\n\n- Not done: z'


def test_fields_in_running_text_become_lists():
  pytest.importorskip('griffe')
  text = 'A plan.\n\nt, dt: times. k: how many;\n  or more\nother: no field\n\n    t: code\n\nArgs:\n  k: as it is'
  assert load('fields').listed(text, {'t', 'dt', 'k'}) == (
      'A plan.\n\n- `t, dt`: times.\n- `k`: how many;\n  or more\nother: no field\n\n    t: code\n\n'
      'Args:\n  k: as it is')


def test_the_site_builds_strictly_and_asks_nothing_of_the_network(tmp_path):
  for module in ('mkdocs', 'material', 'mkdocstrings_handlers.python'):
    pytest.importorskip(module)
  done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', str(tmp_path / 'site')],
                        cwd=ROOT, capture_output=True, text=True, timeout=600,
                        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
  assert done.returncode == 0, done.stdout + done.stderr
  pages = {path.relative_to(tmp_path / 'site').as_posix(): path.read_text()
           for path in (tmp_path / 'site').rglob('*.html')}
  for name in ('index', 'concepts/index', 'models/parcae/index', 'limits/index', 'api/types_and_sockets/index'):
    assert f'{name}.html' in pages
  for name, page in pages.items():
    assert not re.search(r'<(script|img|iframe)[^>]*src="?https?:', page), name
    assert not re.search(r'<link[^>]*rel="(stylesheet|preconnect)"[^>]*href="?https?:', page), name
    if not name.startswith('api/'):  # lists and commands are no running text
      assert not re.search(r'<p>(python -m|bash) |<p>[^<]*\n- ', page), name
  assert 'loopformer.inference.tracing.trace' in pages['api/the_functions/index.html']
  assert '<li><code>active</code>: None (every step runs)' in pages['api/types_and_sockets/index.html']
  assert (tmp_path / 'site/search/search_index.json').exists()
