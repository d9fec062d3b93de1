"""`python -m raysys.retrieval --corpus corpus.jsonl --port 8001`: serves a corpus; the index is built on the first start."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence

from raysys.errors import RaysysError
from raysys.retrieval.search import IndexSettings, LocalSearch


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 ended as asked, 2 the input was wrong."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        settings = IndexSettings(
            corpus=options.corpus,
            index=options.index,
            kind=options.kind,
            stopwords=options.stopwords,
            encoder=options.encoder,
            query_prefix=options.query_prefix,
            passage_prefix=options.passage_prefix,
            rerank=options.rerank,
            candidates=options.candidates,
            topk=options.topk,
            device=options.device,
            rebuild=options.rebuild,
        )
        return _serve(settings, options)
    except RaysysError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # also raised by uvicorn, after it has ended in good order
        return 0


def _serve(settings: IndexSettings, options: argparse.Namespace) -> int:
    from raysys.retrieval import service

    # The port is taken before the index is built, which may last, and answers only afterwards.
    listener = None if options.build_only else service.listen(options.host, options.port)
    began = time.monotonic()
    search = LocalSearch(settings)
    told = search.describe()
    print(f"{told['documents']} documents, {told['index']} index in {search.corpus.folder}, ready in {time.monotonic() - began:.1f} s")
    if listener is None:
        return 0
    app = service.create_app(search, strings=options.strings, threads=options.threads)
    listener.listen(1024)  # whoever reads the next line may connect
    print(f"serving {service.address(listener)}/retrieve", flush=True)
    service.server(app).run(sockets=[listener])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m raysys.retrieval", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus", required=True, help='JSONL of {"id", "contents"} or {"id", "title", "text"}')
    parser.add_argument("--index", help="folder for the index (default: the corpus' path with .index)")
    parser.add_argument("--kind", choices=("bm25", "dense"), default="bm25")
    parser.add_argument("--stopwords", choices=("english", "none"), default="english", help="left out of documents and queries (bm25)")
    parser.add_argument("--encoder", help="Hugging Face folder of the encoder (dense)")
    parser.add_argument("--query-prefix", default="query: ", help="the encoder sees it before a query")
    parser.add_argument("--passage-prefix", default="passage: ", help="the encoder sees it before a document")
    parser.add_argument("--rerank", help="Hugging Face folder of a cross-encoder")
    parser.add_argument("--candidates", type=int, default=20, help="documents that it orders")
    parser.add_argument("--topk", type=int, default=3, help="documents for a request that does not say")
    parser.add_argument("--device", default="cpu", help="of encoder and cross-encoder")
    parser.add_argument("--strings", action="store_true", help="documents as bare texts, whatever the request")
    parser.add_argument("--rebuild", action="store_true", help="make the index again")
    parser.add_argument("--build-only", action="store_true", help="make the index and end")
    parser.add_argument("--threads", type=int, default=2, help="that search")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    return parser


if __name__ == "__main__":
    sys.exit(main())
