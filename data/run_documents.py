"""The documents of a run: their one owner, which reads and splits them once.

documents = RunDocuments(config.data)
documents.fingerprint                      # is known by the record of the source, or found by reading it
for split, document in documents: ...      # yields the texts to whoever needs them
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

from config import DataConfig
from config.bars import progress_bar
from data.corpus import split_documents, training_texts
from data.documents import Document, Report, utf8
from data.recorded import SourceRecord, recorded, write_record
from data.storefolder import stored_record, with_stored

FIRST_DOCUMENTS = 4  # The guard of prompts compares as many documents for training.
# Texts in memory between the training of a tokenizer and tokenising. Of a larger source they are read again.
KEPT_BYTES = 2**30
DOCUMENT_BYTES = 1000  # the memory that a document takes besides its text


class RunDocuments:
    """The documents of a run, each in its split; nothing is read before it is needed.

    Of a store that was prepared (data/storefolder.py) there are no texts. Else the source is read once: texts
    stay in memory, up to `KEPT_BYTES`, until `release`. Where its files are as recorded (data/recorded.py) it
    is read only for who needs the texts.

    Raises:
        ValueError: Any use that reads raises the errors of `split_documents`, or that the source changed.
    """

    def __init__(self, config: DataConfig):
        self.config = with_stored(config).resolved()
        self._record: SourceRecord | None = None
        self._kept: list[tuple[str, Document]] | None = None
        self._digests: bytes | None = None  # the SHA-256 of each text for training, end to end

    @property
    def record(self) -> SourceRecord:
        """What is known of the documents as a whole."""
        if self._record is None:
            store = self.config.store
            self._record = recorded(self.config) if store is None else stored_record(store)
        return self._record or self._read()

    @property
    def fingerprint(self) -> str:
        return self.record.report.fingerprint

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        """Yield (split, document) as `split_documents` does."""
        if _memory_of(self.record.report) <= KEPT_BYTES and self._kept is None:
            self._read()
        if self._kept is not None:
            yield from self._kept
            return
        again = Report()
        yield from split_documents(self.config, again)
        self._refuse_change(again.fingerprint)

    def tokenizer_name(self, settings: str) -> str:
        """Return the name in the cache of the tokenizer that is trained on these documents.

        Args:
            settings: All else that decides it.
        """
        names = self.record.tokenizers
        if settings not in names:
            digests = self._digests
            if digests is None:
                names, digests = self._read().tokenizers, self._digests
            names[settings] = hashlib.sha256(settings.encode() + (digests or b"")).hexdigest()[:32]
            write_record(self.config, self.record)
        return names[settings]

    def release(self) -> None:
        """Give the memory of the texts back; who needs them once more has them read."""
        self._kept = None

    def _read(self) -> SourceRecord:
        """Read the source, record it, and keep its texts if there is room."""
        if self.config.store is not None:
            raise ValueError(f"{self.config.store} holds tokens and no texts; name the --data.source instead")
        began, before, report = time.time_ns(), self._record, Report()
        record = SourceRecord(began, report)
        digests, kept = bytearray(), []
        with progress_bar(desc="reading", unit=" documents", leave=False) as bar:
            for split, document in split_documents(self.config, report):
                record.holds_examples |= document.prompt is not None
                if document.suffix is not None:
                    record.first_gap = record.first_gap or document.where
                if document.messages is not None:
                    record.first_chat = record.first_chat or document.where
                if split == "train" and len(record.first_documents) < FIRST_DOCUMENTS:
                    record.first_documents.append(document)
                for text in training_texts([(split, document)]):
                    digests += hashlib.sha256(utf8(text)).digest()
                if _memory_of(report) <= KEPT_BYTES:
                    kept.append((split, document))
                else:
                    kept.clear()
                bar.update()
        if before is not None:  # Before anything of the other corpus is written down.
            self._refuse_change(report.fingerprint)
            record.tokenizers = before.tokenizers
        write_record(self.config, record)
        self._record, self._digests = record, bytes(digests)
        self._kept = kept or None
        return record

    def _refuse_change(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise ValueError(f"the corpus {self.config.source} changed while it was read: start again")


def _memory_of(report: Report) -> int:
    """Return about how many bytes the documents of a report take in memory."""
    return sum(report.kept_bytes.values()) + DOCUMENT_BYTES * sum(report.kept.values())
