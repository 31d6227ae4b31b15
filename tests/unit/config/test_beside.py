"""What lies beside a run file: chat templates, and files that are no data."""

from pathlib import Path

import pytest

from manylora.config import load_run_file, resolved_yaml
from manylora.types import ConfigError

SMALL = """\
base: seedling
out: runs/first
adapters:
  - name: reverse
    sft:
      train: data/reverse.jsonl
"""


def test_a_chat_template_is_read_and_every_adapter_has_its_own(tmp_path: Path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    (tmp_path / "none.jinja").write_text("messages")
    more = "  - name: other\n    chat_template: '{% for m in messages %}x{% endfor %}'\n"
    text = SMALL + more + "    sft: {train: d.csv.gz}\nchat_template: t.jinja\n"
    (tmp_path / "run.yaml").write_text(text)
    run = load_run_file(tmp_path / "run.yaml")
    assert [entry.chat_template for entry in run.adapters] == [
        "{{ messages }}",
        "{% for m in messages %}x{% endfor %}",
    ]
    (tmp_path / "elsewhere.yaml").write_text(resolved_yaml(run))
    (tmp_path / "t.jinja").unlink()
    assert load_run_file(tmp_path / "elsewhere.yaml") == run
    with pytest.raises(ConfigError, match=r"t\.jinja: there is no such file"):
        load_run_file(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"chat_template: none\.jinja holds no Jinja template"):
        load_run_file(tmp_path / "run.yaml", ["chat_template=none.jinja"])


def test_what_lies_beside_the_run_file_is_never_asked_of_a_hub(tmp_path: Path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(SMALL.replace("data/reverse.jsonl", "data/train"))
    with pytest.raises(ConfigError, match="data/train: there is such a folder or file"):
        load_run_file(tmp_path / "run.yaml")
    for name in ("./x.json", "x.tsv"):
        with pytest.raises(ConfigError, match=r"of local files \.jsonl, .* are read"):
            load_run_file(tmp_path / "run.yaml", [f"adapters.reverse.sft.train={name}"])
