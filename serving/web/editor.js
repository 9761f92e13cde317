// A text area with a mirror below it. The text area has the text, the cursor and the selection; the mirror shows the
// same text with colours, and at the cursor a ghost: text that is proposed, and is no part of the text until it is taken.
//
// A token is {text, p, others: [[text, p], ...]} with its probability and those of the likeliest in its place.

const CLASSES = [0.9, 0.6, 0.3, 0.1]; // The least probability of the classes p0 to p3; p4 is below.

export const classOf = p => `p${CLASSES.filter(least => p < least).length}`;

export class Editor {
  #area; #mirror; #told;
  #text = ""; // as it was when it was last drawn
  #marks = []; // {start, end, token}: tokens that were taken, in order
  #ghost = null; // {at, text, typed, pieces}: pieces are null while it grows, then {text, token}
  #cursor = 0; // as it was when it was last looked at
  #pressed = null; // where a click goes
  #inserts = false; // whether the text changes by `#insert`
  #leaves = false; // whether the next Tab leaves the editor
  #places = new Map(); // a span of the mirror: its token

  // told: changed() after the text did, asked() when a completion is wanted now, dropped() when none is wanted any
  // more, ghost(has) when there is one or none, token(token or null) for the one that is looked at.
  constructor(area, mirror, told) {
    [this.#area, this.#mirror, this.#told] = [area, mirror, told];
    area.addEventListener("input", event => { if (!this.#inserts) this.#edited(event.isComposing); });
    area.addEventListener("compositionend", () => told.changed());
    area.addEventListener("keydown", event => this.#key(event));
    area.addEventListener("mousedown", event => { this.#pressed = this.#seenAt(event); });
    area.addEventListener("click", () => {
      if (this.#pressed !== null && !this.selects) area.setSelectionRange(this.#pressed, this.#pressed);
    });
    area.addEventListener("blur", () => { this.#leaves = false; });
    area.addEventListener("pointermove", event => this.#look(event.clientX, event.clientY));
    area.addEventListener("pointerleave", () => this.#lookAtCursor());
    document.addEventListener("selectionchange", () => this.#moved());
    this.#text = area.value;
    this.#draw();
  }

  get before() { return this.#area.value.slice(0, this.#area.selectionStart); }
  get after() { return this.#area.value.slice(this.#area.selectionEnd); }
  get selects() { return this.#area.selectionStart !== this.#area.selectionEnd; }
  get ghost() { return this.#ghost?.text ?? ""; }

  // Show a ghost at the cursor, or more of it.
  grow(text) {
    this.#ghost ??= { at: this.#area.selectionStart, text: "", pieces: null, typed: 0 };
    this.#ghost.text += text;
    this.#shown();
  }

  // Colour the whole ghost, of whose text some may have been typed since: `pieces` are [text, token].
  colour(pieces) {
    if (!this.#ghost) return;
    this.#ghost.pieces = cut(pieces.map(([text, token]) => ({ text, token })), this.#ghost.typed);
    this.#shown();
    if (!this.#ghost.text) this.drop();
  }

  // Make the ghost part of the text.
  take() {
    if (!this.#ghost?.text) return;
    const { at, text, pieces } = this.#ghost;
    this.#ghost = null;
    this.#area.focus();
    this.#area.setSelectionRange(at, at);
    this.#insert(text);
    let start = at;
    for (const piece of pieces ?? []) {
      if (piece.token) this.#marks.push({ start, end: start + piece.text.length, token: piece.token });
      start += piece.text.length;
    }
    this.#marks.sort((a, b) => a.start - b.start);
    this.#shown();
  }

  drop() {
    if (!this.#ghost) return;
    this.#ghost = null;
    this.#shown();
  }

  focus() { this.#area.focus(); }

  // --- what happens to it ---------------------------------------------------------------------------------

  #key(event) {
    if (event.isComposing) return;
    const bare = !event.ctrlKey && !event.altKey && !event.metaKey && !event.shiftKey;
    if (event.key !== "Tab" && event.key !== "Shift") this.#leaves = event.key === "Escape" && bare;
    if (event.key === "Escape" && bare) {
      this.drop();
      this.#told.dropped();
    } else if (event.key === "Tab" && bare && !this.#leaves) {
      event.preventDefault();
      if (this.ghost) this.take();
      else this.#insert("    ");
    } else if (event.key === " " && event.ctrlKey) {
      event.preventDefault();
      this.#told.asked();
    }
  }

  // As if it were typed, so that it can be undone. Chromium tells of each line twice; here it is one edit.
  #insert(text) {
    this.#inserts = true;
    const isDone = document.execCommand("insertText", false, text);
    this.#inserts = false;
    if (!isDone) this.#area.setRangeText(text, this.#area.selectionStart, this.#area.selectionEnd, "end");
    this.#edited(false);
  }

  #edited(isComposing) {
    const old = this.#text, text = this.#area.value, cursor = this.#area.selectionStart;
    this.#leaves = false;
    this.#cursor = cursor;
    let start = 0, same = 0;
    const most = Math.min(old.length, text.length);
    while (start < Math.min(most, cursor) && old[start] === text[start]) start++;
    while (same < most - start && old.at(-1 - same) === text.at(-1 - same)) same++;
    const [end, more] = [old.length - same, text.length - old.length];
    this.#marks = this.#marks
      .filter(mark => mark.end <= start || mark.start >= end)
      .map(mark => mark.start >= end ? { ...mark, start: mark.start + more, end: mark.end + more } : mark);
    this.#text = text;
    const ghost = this.#ghost, typed = ghost && text.slice(ghost.at, cursor);
    const isGhost = typed && text.length === old.length + typed.length && ghost.text.startsWith(typed)
      && typed.length < ghost.text.length && text.slice(cursor) === old.slice(ghost.at);
    if (isGhost) {
      ghost.at = cursor;
      ghost.text = ghost.text.slice(typed.length);
      ghost.typed += typed.length;
      ghost.pieces &&= cut(ghost.pieces, typed.length);
    } else this.#ghost = null;
    this.#shown();
    if (!isGhost && !isComposing) this.#told.changed();
  }

  #moved() {
    if (document.activeElement !== this.#area || this.#area.value !== this.#text) return;
    if (this.selects || this.#area.selectionStart !== this.#cursor) {
      this.#cursor = this.#area.selectionStart;
      this.drop();
      this.#told.dropped();
    }
    this.#lookAtCursor();
  }

  // A click goes where the text is seen: what stands behind a ghost is elsewhere in the text area, which has none.
  #seenAt(event) {
    const ghost = this.#ghost;
    if (!ghost) return null;
    this.#area.style.pointerEvents = "none";
    const found = document.caretPositionFromPoint?.(event.clientX, event.clientY);
    this.#area.style.pointerEvents = "";
    if (!found || !this.#mirror.contains(found.offsetNode)) return null;
    const range = document.createRange();
    range.setStart(this.#mirror, 0);
    range.setEnd(found.offsetNode, found.offset);
    const seen = range.toString().length;
    return seen <= ghost.at ? seen : Math.max(seen - ghost.text.length, ghost.at);
  }

  // --- what is looked at ----------------------------------------------------------------------------------

  #look(x, y) {
    const span = document.elementsFromPoint(x, y).find(element => this.#places.has(element));
    if (span) this.#tell(span);
    else this.#lookAtCursor();
  }

  #lookAtCursor() {
    const at = this.#area.selectionStart;
    const mark = this.#marks.find(mark => mark.start <= at && at < mark.end);
    const spans = [...this.#places.keys()];
    const looked = mark ? span => this.#places.get(span) === mark.token : span => span.classList.contains("ghost");
    this.#tell(spans.find(looked));
  }

  #tell(span) {
    for (const element of this.#mirror.querySelectorAll(".shown")) element.classList.remove("shown");
    span?.classList.add("shown");
    this.#told.token(this.#places.get(span) ?? null);
  }

  // --- drawing --------------------------------------------------------------------------------------------

  #shown() {
    this.#draw();
    this.#told.ghost(Boolean(this.ghost));
    this.#lookAtCursor();
  }

  #draw() {
    const parts = [], text = this.#area.value;
    let ghost = this.#ghost;
    this.#places.clear();
    const span = (text, token, more) => {
      const element = document.createElement("span");
      element.textContent = text;
      element.className = `${token ? classOf(token.p) : ""} ${more}`.trim();
      if (token) this.#places.set(element, token);
      parts.push(element);
    };
    const part = (start, end, token) => {
      if (ghost && start < ghost.at && ghost.at < end) {
        part(start, ghost.at, token);
        return part(ghost.at, end, token);
      }
      if (ghost?.at === start) {
        for (const piece of ghost.pieces ?? [ghost]) span(piece.text, piece.token, "ghost");
        ghost = null;
      }
      if (token) span(text.slice(start, end), token, "");
      else if (start < end) parts.push(text.slice(start, end));
    };
    let at = 0;
    for (const { start, end, token } of this.#marks) {
      part(at, start);
      part(start, end, token);
      at = end;
    }
    part(at, text.length);
    part(text.length, text.length);
    this.#mirror.replaceChildren(...parts, document.createElement("br")); // It keeps an empty last line.
  }
}

// Return pieces without so much of their beginning.
function cut(pieces, length) {
  const left = [];
  for (const piece of pieces) {
    const text = piece.text.slice(length);
    length = Math.max(length - piece.text.length, 0);
    if (text) left.push({ ...piece, text });
  }
  return left;
}
