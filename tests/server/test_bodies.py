"""Bodies from strangers: what is not a request is refused; what large ones cost."""

import threading

import pytest
import serve_malformed as malformed
from pydantic import ValidationError

from dart_llm.server import schemas
from dart_llm.server.schemas import APIError, ChatBody, CompletionBody, refusal
from serve_cases import FACTS, TEXT_URL, ByteTokenizer, FakeEngine, running, until

MESSAGES = [{"role": "user", "content": "hi"}]
ASSISTANT = {"role": "assistant", "content": "yes"}
CONTEXT = FACTS.context or 0

NOT_JSON = [
    b"",
    b"{",
    b'"text"',
    b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "x"} {"prompt": "y"}',
]


@pytest.fixture(scope="module")
def server():
    with running(max_body_kib=512, max_tokens=8) as server:
        yield server


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:40]))
def test_what_is_not_a_json_request_is_refused(server, body):
    with server.client() as client:
        headers = {"Content-Type": "application/json"}
        response = client.post(TEXT_URL, content=body, headers=headers)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert not server.engine.asked


def read(kind, data):
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise refusal(error.errors()) from None


MISSING, UNKNOWN = "missing_required_parameter", "unknown_parameter"
WRONG = [
    ({"messages": []}, "messages", "invalid_value", ""),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value", ""),
    ({"messages": [{"content": "x"}]}, "messages.0.role", MISSING, ""),
    ({"messages": [{"role": "user"}]}, "messages.0", MISSING, "role user needs content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_value", "str"),
    ({"max_tokens": True}, "max_tokens", "invalid_value", ""),
    ({"temperature": 2.1}, "temperature", "invalid_value", ""),
    ({"stop": ["a"] * 5}, "stop", "invalid_value", "list should have at most 4 items"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_value", ""),
    ({"dart": {"sparsity": 1}}, "dart.sparsity", "invalid_value", ""),
    ({"dart": {"sparcity": 0.5}}, "dart.sparcity", UNKNOWN, "did you mean sparsity?"),
    ({"dart": {"x" * 5000: 1}}, "dart." + "x" * 100, UNKNOWN, "extra inputs"),
    ({"max_token": 5}, "max_token", UNKNOWN, "supplied: max_token; did you mean max_tokens?"),
    ({"tools": [{}]}, "tools", "unsupported", "leave it out"),
]


@pytest.mark.parametrize(("change", "param", "code", "said"), WRONG)
def test_wrong_fields_are_named(change, param, code, said):
    with pytest.raises(APIError) as caught:
        read(ChatBody, {"messages": MESSAGES, **change})
    error = caught.value
    assert (error.status, error.param) == (400, param)
    assert (error.code or "").startswith(code) and said in error.message


def test_what_asks_for_nothing_is_taken():
    given = {name: {"any": "thing"} for name in schemas.IGNORED}
    given |= {"presence_penalty": 0.0, "best_of": 1, "seed": 1}
    wanted = read(ChatBody, {"messages": MESSAGES, "seed": 1})
    for value in schemas.NEUTRAL:
        body = {"messages": MESSAGES, **dict.fromkeys(schemas.UNSUPPORTED, value), **given}
        assert read(ChatBody, body) == wanted
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    spoken = {**ASSISTANT, "tool_calls": [], "reasoning_content": "so I think", "refusal": None}
    messages = [{"role": "user", "content": parts}, spoken, {"role": "assistant"}]
    body = read(ChatBody, {"messages": messages, "top_logprobs": 0})
    assert [message.text for message in body.messages] == ["one two", "yes", ""]


def test_of_many_faults_few_are_collected():
    bodies = [
        (CompletionBody, {"prompt": [1] * 1000 + ["a"] * 1000}),
        (CompletionBody, {"prompt": [["a"] * 1000] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    ]
    for kind, body in bodies:
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(body)
        assert caught.value.error_count() <= 5


class Watched(ByteTokenizer):
    """Counts the texts in work; none is done before ``free`` is set."""

    def __init__(self):
        self.free = threading.Event()
        self.lengths = []
        self.inside = self.most = 0

    def __call__(self, text, **options):
        self.lengths.append(len(text))
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.free.wait(20)
        self.inside -= 1
        return super().__call__(text)


def test_long_texts_are_not_read_to_their_ends_and_become_tokens_one_at_a_time():
    words, text = Watched(), "e\u0301" * 340_000
    with running(FakeEngine(), words) as server:
        posts = [server.beside(TEXT_URL, prompt=text) for _ in range(6)]
        posts.append(server.beside(messages=[{**MESSAGES[0], "content": text}]))
        try:
            until(lambda: words.inside == 1)
            with server.client() as client:
                for path in ("/healthz", "/api/runs", "/v1/models"):  # beside everything else
                    assert client.get(path).status_code == 200
            assert not any(post.done() for post in posts)
        finally:
            words.free.set()
        answers = [post.result(20) for post in posts]
    for answer in answers:
        assert answer.status_code == 400
        assert f"has more than {CONTEXT} tokens: shorten it" in answer.json()["error"]["message"]
    assert words.most == 1 and sum(words.lengths) <= 7 * 4 * (CONTEXT + 64)


@pytest.mark.contract("server never answers 5xx to malformed input")
@pytest.mark.parametrize("way", ["by hand", "from the description"])
def test_malformed_requests_never_make_it_fail_or_hang(server, caplog, way):
    """The benchmark has a thousand of them."""
    if way == "by hand":
        outcomes, least = list(malformed.hand_written(server.url)), 251
    else:
        outcomes, least = malformed.from_schema(server.url, 60), 51
        assert {outcome.what.split(" ")[1] for outcome in outcomes} >= set(malformed.POSTS)
    summary = malformed.summary(outcomes)
    assert summary["bad"] == [] and summary["requests"] >= least
    assert way != "by hand" or summary["statuses"]["400"] > 200
    assert not [record for record in caplog.records if record.name == "dart_llm.serve"]
