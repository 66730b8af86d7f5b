"""Signed addresses do not appear in the log."""

import logging

from hub_client import Client, copy_with_card
from hub_server import Account, HubServer

from modeling_optsg.hub import commits

PUSH = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, force=True)
from modeling_optsg.hub.push_checkpoint import push_checkpoint
push_checkpoint({!r}, "org/logged")
print("PUSHED")
"""


def test_a_push_logs_no_signatures(tiny_checkpoint, tmp_path):
    folder = copy_with_card(tiny_checkpoint, tmp_path / "tiny")
    with HubServer(tmp_path / "hub", {"hf_writes": Account("ann", ("org",))}).running() as hub:
        client = Client(hub.endpoint, tmp_path / "client", "hf_writes")
        status, output, error = client.python(PUSH.format(str(folder)))
        client.close()
    assert status == 0 and "PUSHED" in output, error
    # The upload was logged, without the query of its address.
    assert "PUT" in error and "?…" in error and "signature" not in error


def test_only_queries_are_hidden(caplog):
    with caplog.at_level("INFO", "httpx"), caplog.at_level("INFO", "other"), commits._without_signatures():
        logging.getLogger("httpx").info('HTTP Request: %s %s "%s"', "PUT", "http://h/a?signature=x&b=1", "200 OK")
        logging.getLogger("httpx").info("a question?")
        logging.getLogger("other").info("http://h/a?b=1")
    logging.getLogger("httpx").warning("http://h/a?b=1")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ['HTTP Request: PUT http://h/a?… "200 OK"', "a question?…", "http://h/a?b=1", "http://h/a?b=1"]


def test_errors_contain_no_signatures():
    error = OSError("400 for url 'http://h/a?signature=x' is refused")
    assert commits._reason(error, "org/name") == "400 for url 'http://h/a?…' is refused"
