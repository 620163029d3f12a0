"""What a job says where there is no terminal."""

from dart_llm.reporting.console import Ui


def test_news_that_repeats_the_first_line_is_said_once(capsys):
    ui = Ui()
    ui.live = False
    with ui.status("loading mine") as news:
        news("loading mine")
        news("learning")
    assert capsys.readouterr().err == "loading mine\nlearning\n"
