"""Pages of the site that are made of what stands elsewhere in the repository: a page a model from its configuration's
own words and its report, the API from docstrings, and the limits from the reports. Used by mkdocs (mkdocs.yml); `python
-m mkdocs build --strict`.
"""
import ast
import functools
import os
from pathlib import Path
import re
import tomllib

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / 'experiments/reports'
LINK = re.compile(r'(!?)\[([^\]]*)\]\(([^()\s]+)\)')
DOUBT = re.compile(r'doubt|not measured|not done|did not|not reproduce|what it does not|limits', re.I)
LACKING = re.compile(r'(not measured|not done|left out|departures?|not trained|what is not)\b', re.I)


def modules(folder: str) -> list[str]:
  """Names of the modules in a folder of the library, and in the folders within it."""
  return ['.'.join(path.relative_to(ROOT).with_suffix('').parts)
          for path in sorted((ROOT / 'loopformer' / folder).rglob('*.py')) if path.name != '__init__.py']


API = {
    'The functions': ['loopformer.api', 'loopformer.inference.tracing'],
    'Types and sockets': ['loopformer.types'],
    'Model and loop': ['loopformer.model', 'loopformer.loop', 'loopformer.starts', 'loopformer.memories'],
    'Plans': ['loopformer.plans'],
    'Cells': ['loopformer.cells.cell', 'loopformer.cells.plain', 'loopformer.cells.timed', 'loopformer.cells.recur',
              'loopformer.cells.halting', 'loopformer.cells.damped'],
    'Layers': ['loopformer.nn.layers', 'loopformer.nn.blocks', 'loopformer.nn.stack', 'loopformer.nn.attention',
               'loopformer.nn.kernels', 'loopformer.nn.positions', 'loopformer.nn.embed', 'loopformer.nn.inject',
               'loopformer.nn.condition', 'loopformer.nn.low_rank', 'loopformer.roles'],
    'Objectives and terms': ['loopformer.objective', *modules('terms')],
    'Training': ['loopformer.config', 'loopformer.training.train', 'loopformer.training.step',
                 'loopformer.training.control', 'loopformer.optim', 'loopformer.training.averages',
                 'loopformer.training.masters', 'loopformer.training.frozen', 'loopformer.sharding'],
    'Inference': ['loopformer.inference.engine', 'loopformer.inference.exits', 'loopformer.inference.evaluate',
                  'loopformer.inference.measures', 'loopformer.inference.sampler', 'loopformer.inference.sampling'],
    'Converting': ['loopformer.convert', 'loopformer.convert.relaxed', 'loopformer.convert.retrofit'],
    'Masked diffusion': modules('diffusion'),
    'Tasks': modules('tasks'),
    'Data': modules('data'),
    'Parts of papers': modules('papers'),
}


@functools.cache
def models() -> dict[str, dict]:
  """Name -> title, configs, reports and equation of every page of a model: those of models.toml, and after them,
  without an equation, configurations and reports that it does not name."""
  told = tomllib.loads((ROOT / 'docs/site/models.toml').read_text(encoding='utf-8'))
  configs = {path.stem for path in (ROOT / 'experiments/configs').glob('*.py')} - {'__init__'}
  reports = {path.parent.name for path in REPORTS.glob('*/README.md')}
  configs -= {name for model in told.values() for name in model['configs']}
  reports -= {name for model in told.values() for name in model['reports']}
  others = {}
  for name in sorted(configs | reports):
    text = about(name) if name in configs else (REPORTS / name / 'README.md').read_text(encoding='utf-8')
    title = re.split(r'[:.(\n]', text.strip('# '))[0].strip()
    others[name] = {'title': title, 'configs': [name] * (name in configs),
                    'reports': [name] * (name in reports), 'equation': ''}
  return told | others


def page_of_report(folder: str) -> str | None:
  """The page that shows a report, or None."""
  return next((f'models/{name}.md' for name, model in models().items() if folder in model['reports']), None)


def relinked(text: str, source: Path, page: str) -> str:
  """Markdown of a file of the repository as it stands in a page of the site: links to other pages lead there, pictures
  are beside the page of reports, and what is in the repository alone is named by its path.

  source: the file that the text comes from; page: where it is shown, from the site's root.
  """
  def link(found):
    picture, words, target = found.groups()
    if re.match(r'[a-z]+:|#', target):
      return found[0]
    path, _, anchor = target.partition('#')
    there = Path(os.path.normpath(source.parent / path))
    shown = _shown(there, picture)
    if shown is None:
      name = there.relative_to(ROOT).as_posix() if there.is_relative_to(ROOT) else path
      return f'{words} (`{name}`)' if words.strip('`') != name else f'`{name}`'
    relative = os.path.relpath(shown, Path(page).parent).replace(os.sep, '/')
    return f'{picture}[{words}]({relative}{"#" + anchor if anchor and there.is_relative_to(ROOT / "docs") else ""})'

  return LINK.sub(link, spaced(text))


def spaced(text: str) -> str:
  """The same Markdown with what the site's reader of it needs and GitHub's does not: an empty line before a list that
  follows a paragraph or code, and the code within a list eight spaces in, not six."""
  lines, fenced, listed, code = [], False, False, False
  for line in text.splitlines():
    before = lines[-1].strip() if lines else ''
    fenced ^= line.startswith('```')
    if not fenced and line.strip():
      begins = line.startswith(('- ', '1. '))
      if begins and before and (code or not listed):
        lines.append('')
      listed = begins or listed and line.startswith(' ')
      code = listed and line.startswith(' ' * 6) and (code or not before)
    lines.append('  ' + line if code and line.strip() else line)
  return '\n'.join(lines) + '\n' * text.endswith('\n')


def _shown(path, picture):
  """Where the site has a file of the repository, or None."""
  if path.is_relative_to(ROOT / 'docs'):
    return path.relative_to(ROOT / 'docs').as_posix()
  if not path.is_relative_to(REPORTS):
    return None
  inside = path.relative_to(REPORTS)
  if picture:
    return f'reports/{inside.as_posix()}'
  if path == REPORTS / 'README.md':
    return 'models/index.md'
  if inside.parts and (inside.name == 'README.md' or len(inside.parts) == 1):
    return page_of_report(inside.parts[0])
  return None


def demoted(text: str, by: int = 1) -> str:
  """The same Markdown with headings so many levels lower, code left alone."""
  lines, code = [], False
  for line in text.splitlines():
    code ^= line.startswith('```')
    lines.append('#' * by + line if line.startswith('#') and not code else line)
  return '\n'.join(lines)


def about(config: str) -> str:
  """The docstring of a configuration."""
  return ast.get_docstring(ast.parse((ROOT / f'experiments/configs/{config}.py').read_text(encoding='utf-8'))) or ''


def model_page(name: str, model: dict) -> str:
  """Equation, command and all that the configuration says of itself, and the reports."""
  page, parts = f'models/{name}.md', [f'# {model["title"]}']
  if model['equation']:
    parts.append(f'The step of the loop:\n\n```text\n{model["equation"].strip()}\n```')
  for config in model['configs']:
    text = about(config)
    first, _, rest = text.partition('\n\n')
    parts += [f'## Configuration `{config}`', first.replace('<', '&lt;'),
              f'```text\n{rest.strip()}\n```' if rest else '']
  for folder in model['reports']:
    source = REPORTS / folder / 'README.md'
    parts.append(relinked(demoted(source.read_text(encoding='utf-8')), source, page))
  return '\n\n'.join(filter(None, parts)) + '\n'


def index_page() -> str:
  """The table of reports, with links to the pages of models, and the models that have no report."""
  source = REPORTS / 'README.md'
  text = relinked(source.read_text(encoding='utf-8'), source, 'models/index.md')
  text = text.replace('# What was measured', '# Models, and what was measured', 1)
  others = [f'- [{model["title"]}]({name}.md)' for name, model in models().items() if not model['reports']]
  return text + '\nWithout a report:\n\n' + '\n'.join(others) + '\n'


def claims() -> dict[str, tuple[str, str]]:
  """Folder of a report -> what is claimed and what came out, from the table of all reports."""
  text = (REPORTS / 'README.md').read_text(encoding='utf-8')
  rows = re.findall(r'(?m)^\| \[[^\]]*\]\(([^/)]+)/[^)]*\) \| (.*) \| (.*) \|$', text)
  return {folder: (claim, found) for folder, claim, found in rows}


def doubts(text: str) -> str:
  """Of a report, the sections whose headings tell of doubts or of what was not done, and such paragraphs elsewhere."""
  found = []
  for section in re.split(r'(?m)^(?=## )', text):
    heading, _, body = section.partition('\n')
    if heading.startswith('## ') and DOUBT.search(heading):
      found.append(f'*{heading[3:].strip()}*\n\n{body.strip()}')
      continue
    for paragraph in re.split(r'\n\s*\n', section):
      if LACKING.match(paragraph.lstrip('*- ')):
        found.append(paragraph.strip())
  return '\n\n'.join(found)


def departures(text: str) -> str:
  """Of a configuration's docstring, the paragraphs that tell where it departs from the paper or what it lacks."""
  return '\n\n'.join(paragraph.strip() for paragraph in re.split(r'\n\s*\n', text)
                     if re.match(r'(departures?|not (here|published|in|done|known)|left out)\b', paragraph.strip(),
                                 re.I))


def limits_page() -> str:
  """What did not reproduce, what was not measured, and where configurations depart from papers: in the reports' and
  configurations' own words."""
  page = 'limits.md'
  parts = ['# Honest limits', 'Collected from the reports and configurations, in their words. Everything was measured '
           'at sizes of minutes on two CPU cores, if a report does not say otherwise: nothing here tells how a claim '
           'fares at scale.']
  for name, model in models().items():
    own = []
    for folder in model['reports']:
      source = REPORTS / folder / 'README.md'
      if folder in claims():
        own.append('Claim: {}. At our size: {}.'.format(*claims()[folder]))
      if text := doubts(source.read_text(encoding='utf-8')):
        own.append(relinked(text, source, page))
    for config in model['configs']:
      if text := departures(about(config)):
        own.append('```text\n' + text + '\n```')
    if own:
      parts += [f'## {model["title"]}', f'[Its page](models/{name}.md).', *own]
  return '\n\n'.join(parts) + '\n'


def api_page(title: str, names: list[str]) -> str:
  """The docstrings of modules."""
  return f'# {title}\n\n' + '\n'.join(f'## `{name}`\n\n::: {name}\n' for name in names)


def slug(title: str) -> str:
  """The name of a page's file."""
  return title.lower().replace(' ', '_')


def pages() -> dict[str, str]:
  """Path in the site -> Markdown of every page that is made."""
  made = {f'models/{name}.md': model_page(name, model) for name, model in models().items()}
  made |= {'models/index.md': index_page(), 'limits.md': limits_page()}
  return made | {f'api/{slug(title)}.md': api_page(title, names) for title, names in API.items()}


def pictures() -> dict[str, Path]:
  """Path in the site -> file, of the pictures of all reports."""
  return {f'reports/{path.relative_to(REPORTS).as_posix()}': path
          for path in sorted(REPORTS.rglob('*')) if path.suffix in ('.png', '.svg')}


# What mkdocs calls ---------------------------------------------------------------------------------------------------


def on_config(config):
  """Fills in the lists of models and of the API where the navigation says so."""
  of_models = [{model['title']: f'models/{name}.md'} for name, model in models().items()]
  lists = {'MODELS': [{'Overview': 'models/index.md'}, *of_models],
           'API': [{title: f'api/{slug(title)}.md'} for title in API]}
  config.nav = [{title: lists.get(entry, entry) if isinstance(entry, str) else entry}
                for part in config.nav for title, entry in part.items()]
  return config


def on_files(files, config):
  """Adds the pages that are made, and the pictures of reports."""
  from mkdocs.structure.files import File
  for path, text in pages().items():
    files.append(File.generated(config, path, content=text))
  for path, source in pictures().items():
    files.append(File.generated(config, path, abs_src_path=str(source)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Links of pages that are files of docs/, which lead into the repository."""
  if page.file.abs_src_path is None or not Path(page.file.abs_src_path).is_relative_to(ROOT / 'docs'):
    return markdown
  return relinked(markdown, Path(page.file.abs_src_path), page.file.src_uri)
