import yaml
from conftest import ROOT


def test_metafile_lists_every_config_and_no_guessed_result():
    (metafile,) = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    models = yaml.safe_load((ROOT / metafile).read_text())['Models']
    assert {m['Config'] for m in models} == {str(p.relative_to(ROOT)) for p in (ROOT / 'configs/msvit').glob('*.py')}
    readme = (ROOT / 'configs/msvit/README.md').read_text()
    for model in models:
        assert model['Config'].endswith(f'/{model["Name"]}.py') and model['Name'] in readme
        assert model['Results'] == []
