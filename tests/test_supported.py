"""The page of what is supported says what the code says."""

from conftest import ROOT

from benchmarks import supported


def test_the_page_of_supported_layers_is_what_the_code_says():
    text = supported.page()
    assert (ROOT / "docs" / "supported.md").read_text() == text, (
        "python -m benchmarks.supported --write"
    )
    # Not by chance: what is known to be there, and not to be there.
    assert "| ReLU | 1-Lipschitz, box, slopes | any | any | yes | yes | yes | yes |" in text
    assert "| circular padding | times the root of 4 copies | any |" in text
    assert "| max pooling, windows apart | 1-Lipschitz, " in text
    assert "| max pooling, overlapping windows | 2-Lipschitz, " in text
    assert "| sort | 1-Lipschitz, box, slopes | any | any | yes | – | – | yes |" in text
