// Tags images with an exported model in the browser: the same steps as in optsg/onnx, for one image.

const BERT_PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/u;
const CJK = /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/u;
const MIN_SLOT_PROBABILITY = 1e-3, MAX_THRESHOLD = 0.99, TOLERANCE = 1e-3, MIN_RATIO = 0.1;
const WORD_TEMPERATURE = 2, MIN_PROBABILITY = 1e-6;
const FORMAT = 1;
// Tokens are the characters of keys, and the last character ends a range of keys.
const MAX_TOKENS = 0xffff;
// Pillow resizes bytes with weights of this many bits.
const PRECISION_BITS = 22;

const logit = (p) => Math.log(p / (1 - p));
const sigmoid = (x) => 0.5 * (1 + Math.tanh(0.5 * x));
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const logAddExp = (a, b) => Math.max(a, b) + Math.log1p(Math.exp(-Math.abs(a - b)));

// Titles: the tokenizer of BERT, from tokenizer.json.
export class WordPiece {
  constructor(json) {
    if (json.model.type !== "WordPiece" || json.normalizer?.type !== "BertNormalizer") {
      throw new Error(`This page reads titles with WordPiece; the model has ${json.model.type}. Use optsg.onnx.`);
    }
    Object.assign(this, { model: json.model, normalizer: json.normalizer });
    this.vocabulary = new Map(Object.entries(json.model.vocab));
    this.maxLength = json.truncation?.max_length ?? Infinity;
    const { post_processor: post } = json;
    const special = (name) => post.special_tokens[name].ids;
    this.frame = post.type === "BertProcessing"
      ? [[post.cls[1]], [post.sep[1]]]
      : this.#aroundSequence(post.single, special);
  }

  #aroundSequence(parts, special) {
    const sequence = parts.findIndex((part) => part.Sequence);
    const ids = (some) => some.flatMap((part) => special(part.SpecialToken.id));
    return [ids(parts.slice(0, sequence)), ids(parts.slice(sequence + 1))];
  }

  #normalize(text) {
    const { clean_text: clean, handle_chinese_chars: chinese, strip_accents: strip, lowercase } = this.normalizer;
    if (clean) {
      text = text.replace(/[\t\n\r]|\p{Zs}/gu, " ").replace(/[\0\ufffd\p{Cc}\p{Cf}\p{Co}\p{Cs}]/gu, "");
    }
    if (chinese) text = [...text].map((c) => (CJK.test(c) ? ` ${c} ` : c)).join("");
    if (strip ?? lowercase) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
    // Each character by itself: the last sigma of a word is one like others.
    return lowercase ? [...text].map((c) => c.toLowerCase()).join("") : text;
  }

  #splitWord(word) {
    const characters = [...word], unknown = this.vocabulary.get(this.model.unk_token);
    if (characters.length > this.model.max_input_chars_per_word) return [unknown];
    const ids = [];
    for (let start = 0; start < characters.length; ) {
      let end = characters.length, id;
      for (; end > start; end--) {
        const piece = characters.slice(start, end).join("");
        id = this.vocabulary.get(start ? this.model.continuing_subword_prefix + piece : piece);
        if (id !== undefined) break;
      }
      if (id === undefined) return [unknown];
      ids.push(id);
      start = end;
    }
    return ids;
  }

  encode(text) {
    const words = [];
    for (const word of this.#normalize(text).split(/\s+/u)) {
      let part = "";
      for (const character of word) {
        if (BERT_PUNCTUATION.test(character)) {
          words.push(part, character);
          part = "";
        } else part += character;
      }
      words.push(part);
    }
    const ids = words.filter(Boolean).flatMap((word) => this.#splitWord(word));
    const [before, after] = this.frame;
    return [...before, ...ids.slice(0, this.maxLength - before.length - after.length), ...after];
  }
}

// Tags: byte-level tokens, from tag_tokenizer.json.
export class TagDecoder {
  constructor(json) {
    this.pieces = new Map(Object.entries(json.model.vocab).map(([piece, id]) => [id, piece]));
    const ids = [...this.pieces.keys(), ...json.added_tokens.map((token) => token.id)];
    const size = 1 + ids.reduce((a, b) => Math.max(a, b), -1);
    if (size > MAX_TOKENS) {
      throw new Error(`The tag tokenizer has ${size} tokens; this page supports up to ${MAX_TOKENS}. Use optsg.onnx.`);
    }
    this.special = new Set(json.added_tokens.filter((token) => token.special).map((token) => token.id));
    // Printable bytes stand for themselves, and the others for the characters from 256 on.
    this.bytes = new Map();
    let next = 256;
    for (let byte = 0; byte < 256; byte++) {
      const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
      this.bytes.set(String.fromCodePoint(printable ? byte : next++), byte);
    }
  }

  decode(ids) {
    const pieces = ids.filter((id) => !this.special.has(id)).map((id) => this.pieces.get(id));
    const bytes = [...pieces.join("")].map((character) => this.bytes.get(character));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes)).replace(/^ /, "");
  }
}

const FILTERS = {
  1: { support: 3, at: (x) => (x === 0 ? 1 : Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
  2: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  3: {
    support: 2,
    at: (x) => {
      x = Math.abs(x);
      return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
    },
  },
};
const sinc = (x) => Math.sin(Math.PI * x) / (Math.PI * x);

// The weights of Pillow's Image.resize: for each output position the first input position and integer weights.
function resizeWeights(inputs, outputs, filter) {
  const scale = inputs / outputs, stretch = Math.max(scale, 1), support = filter.support * stretch;
  return Array.from({ length: outputs }, (_, position) => {
    const centre = (position + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(inputs, Math.trunc(centre + support + 0.5));
    const weights = [];
    for (let x = first; x < last; x++) weights.push(filter.at((x - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((w) => Math.trunc((w / sum) * 2 ** PRECISION_BITS + (w < 0 ? -0.5 : 0.5))) };
  });
}

// Resizes one axis of bytes [rows, length, width] of three channels, as Pillow does.
function resizeAxis(pixels, rows, length, outputs, inner, filter) {
  const table = resizeWeights(length, outputs, filter), resized = new Uint8ClampedArray(rows * outputs * inner);
  for (let row = 0; row < rows; row++) {
    for (let position = 0; position < outputs; position++) {
      const { first, weights } = table[position], target = (row * outputs + position) * inner;
      for (let i = 0; i < inner; i++) {
        let sum = 2 ** (PRECISION_BITS - 1), source = (row * length + first) * inner + i;
        for (const weight of weights) {
          sum += pixels[source] * weight;
          source += inner;
        }
        resized[target + i] = Math.floor(sum / 2 ** PRECISION_BITS);
      }
    }
  }
  return resized;
}

// Returns the pixels [3, height, width] of an image as the image processor of the model does.
export function readPixels({ data, width, height }, settings) {
  const filter = FILTERS[settings.resample];
  if (!filter || settings.crop || !settings.size.height) throw new Error("This page cannot resize images as the model needs.");
  let pixels = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) pixels.set(data.subarray(4 * i, 4 * i + 3), 3 * i);
  const { height: rows, width: columns } = settings.size;
  pixels = resizeAxis(pixels, height, width, columns, 3, filter);
  pixels = resizeAxis(pixels, 1, height, rows, 3 * columns, filter);
  const values = new Float32Array(3 * rows * columns);
  for (let channel = 0; channel < 3; channel++) {
    const mean = settings.mean[channel], std = settings.std[channel];
    for (let i = 0; i < rows * columns; i++) {
      values[channel * rows * columns + i] = (pixels[3 * i + channel] * settings.rescale_factor - mean) / std;
    }
  }
  return values;
}

// The label vocabulary sorted by tokens, in which the tags with a prefix are neighbours.
class SortedTags {
  constructor(classes) {
    const keys = classes.map((tag) => String.fromCharCode(...tag));
    this.order = keys.map((_, index) => index).sort((a, b) => (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : 0));
    this.keys = this.order.map((index) => keys[index]);
    this.classes = new Map(keys.map((key, index) => [key, index]));
  }

  #lowerBound(key) {
    let low = 0, high = this.keys.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.keys[middle] < key) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  maxLogit(logits, prefix) {
    let best = -Infinity;
    const end = this.#lowerBound(`${prefix}\uffff`);
    for (let i = this.#lowerBound(prefix); i < end; i++) best = Math.max(best, logits[this.order[i]]);
    return best;
  }
}

export class Tagger {
  // Loads a folder of `optsg export-onnx`; `ort` is the module of onnxruntime-web.
  static async load(folder, ort) {
    const tagger = new Tagger();
    const fetched = async (name) => {
      const response = await fetch(new URL(name, folder));
      if (!response.ok) throw new Error(`${name} of the model is missing at ${folder} (${response.status}).`);
      return response;
    };
    const json = async (name) => (await fetched(name)).json();
    const program = async (name) => ort.InferenceSession.create(new Uint8Array(await (await fetched(name)).arrayBuffer()));
    const settings = await json("settings.json");
    if (settings.format !== FORMAT) throw new Error(`The model has format ${settings.format}, not ${FORMAT}; export it again.`);
    const [titles, tags] = await Promise.all([json("tokenizer.json"), json("tag_tokenizer.json")]);
    Object.assign(tagger, { ort, settings, titles: new WordPiece(titles), tags: new TagDecoder(tags) });
    // One after the other, because a large model needs the memory only once then.
    tagger.encoder = await program("encoder.onnx");
    tagger.step = await program("decoding_step.onnx");
    if (settings.classes) {
      tagger.classifier = await program("classifier.onnx");
      tagger.sorted = new SortedTags(settings.classes);
      const logCounts = settings.class_counts.map(Math.log), total = settings.class_counts.reduce((a, b) => a + b, 0);
      const mean = settings.class_counts.reduce((sum, count, i) => sum + (count / total) * logCounts[i], 0);
      tagger.adjustment = logCounts.map((count) => settings.generation.logit_adjustment * count);
      tagger.meanAdjustment = settings.generation.logit_adjustment * mean;
    }
    return tagger;
  }

  #tensor(type, values, shape) {
    if (type === "int64") values = BigInt64Array.from(values, BigInt);
    return new this.ort.Tensor(type, values, shape);
  }

  async #run(session, inputs) {
    // A program has no inputs that it does not read.
    const feeds = Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]]));
    return session.run(feeds);
  }

  // Tags an image (ImageData without transparency, or null) with a title (text, which may be empty).
  async tag(image, title) {
    if (!image && !title.trim()) throw new Error("There is neither an image nor a title.");
    const { size } = this.settings.image, shape = [1, 1, 3, size.height, size.width];
    const pixels = image ? readPixels(image, this.settings.image) : new Float32Array(3 * size.height * size.width);
    const ids = title.trim() ? this.titles.encode(title) : [0];
    const encoded = await this.#run(this.encoder, {
      pixel_values: this.#tensor("float32", pixels, shape),
      frame_mask: this.#tensor("int64", [image ? 1 : 0], [1, 1]),
      input_ids: this.#tensor("int64", ids, [1, ids.length]),
      attention_mask: this.#tensor("int64", ids.map(() => (title.trim() ? 1 : 0)), [1, ids.length]),
    });
    const modality = this.classifier ? this.#modality(encoded) : "image+title";
    const { threshold, limit } = this.#limits(modality);
    const weights = this.settings.generation.fusion_weights?.[modality === "image words" ? "title" : modality];
    const logits = this.classifier ? await this.#classify(encoded, weights) : null;
    const slots = await this.#search(encoded, { threshold, weights, logits });
    return this.#rank(slots, { threshold, weights, logits }).slice(0, limit);
  }

  #modality({ reads_words: words, uses_image: image, has_title: title }) {
    if (words.data[0]) return "image words";
    return image.data[0] ? (title.data[0] ? "image+title" : "image") : "title";
  }

  #limits(modality) {
    const { generation } = this.settings, limit = generation.max_tags ?? undefined;
    if (modality === "image words" && generation.by_modality) {
      return { threshold: generation.min_word_tag_probability, limit: limit ?? generation.num_word_tags };
    }
    return { threshold: generation.thresholds[modality] ?? generation.thresholds["image+title"], limit };
  }

  async #logitsOf(vectors) {
    return (await this.#run(this.classifier, { vectors })).logits.data;
  }

  async #classify(encoded, weights) {
    const logits = (await this.#logitsOf(encoded.vectors)).map((value, i) => value - this.adjustment[i]);
    if (!encoded.uses_words.data[0]) return logits;
    // An image without a title: the mean of its probabilities and those of its words as titles.
    const [scale, bias] = weights && weights[1] > 0 ? [weights[1], weights[2]] : [1, 0];
    const [, number, width] = encoded.word_vectors.dims, { data } = encoded.word_vectors;
    const ratios = Array.from(encoded.word_probabilities.data, (p) => p ** (1 / WORD_TEMPERATURE));
    const total = ratios.reduce((a, b) => a + b, 0), familiarity = encoded.familiarity.data[0];
    const words = await this.#logitsOf(this.#tensor("float32", data, [number, width]));
    return logits.map((value, i) => {
      let ofWords = 0;
      for (let word = 0; word < number; word++) {
        ofWords += (ratios[word] / total) * sigmoid(scale * (words[word * logits.length + i] - this.meanAdjustment) + bias);
      }
      const mixed = familiarity * sigmoid(scale * value + bias) + (1 - familiarity) * ofWords;
      return (logit(clamp(mixed, MIN_PROBABILITY, 1 - MIN_PROBABILITY)) - bias) / scale;
    });
  }

  // Beam search inside slots. Returns for each slot its hypotheses.
  async #search(encoded, ranking) {
    const { generation, max_tag_tokens: maxTokens, sep_token_id: sep } = this.settings;
    const { num_beams: width, pad_bias: padBias, min_beam_probability: least } = generation;
    const penalty = width > 1 ? generation.length_penalty : 0, minLog = least ? Math.log(least) : -Infinity;
    const prompts = encoded.order_prompts, number = prompts.dims[1];
    const cells = Array.from({ length: number }, (_, slot) => ({ slot, beam: { tokens: [0], cell: slot } }));
    let found = await this.#decode(encoded, cells, null, 0);
    const slots = cells.map((_, slot) => {
      const isTag = found.logProbs(slot, 0) + found.others(slot) > found.pad(slot) + padBias;
      return Array.from({ length: isTag ? width : 0 }, (_, k) => {
        const own = found.logProbs(slot, k), all = logAddExp(logAddExp(found.others(slot), found.pad(slot)), found.sep(slot));
        return { tokens: [found.token(slot, k)], ranking: own, logProb: own + found.others(slot) - all, cell: slot };
      }).filter((beam, k) => k === 0 || beam.logProb >= minLog);
    });
    for (let length = 1; length <= maxTokens; length++) {
      let open = slots.flatMap((beams, slot) => beams.filter((beam) => !beam.finished).map((beam) => ({ slot, beam })));
      open = this.#dropHopeless(open, ranking);
      if (!open.length) break;
      found = await this.#decode(encoded, open, found, length);
      for (const [row, { beam }] of open.entries()) beam.row = row;
      for (const slot of new Set(open.map((one) => one.slot))) {
        const candidates = slots[slot].flatMap((beam) => this.#continue(beam, found, length));
        const rank = (beam) => (penalty ? beam.ranking / beam.tokens.length ** penalty : beam.ranking);
        candidates.sort((a, b) => rank(b) - rank(a));
        slots[slot] = candidates.slice(0, width).filter((beam, k) => k === 0 || beam.finished === "dropped" || beam.logProb >= minLog);
      }
    }
    return slots.map((beams) => beams.filter((beam) => beam.finished !== "dropped").slice(0, generation.num_return_sequences));
  }

  #continue(beam, found, length) {
    if (beam.finished) return [beam];
    const { row } = beam, { sep_token_id: sep, generation } = this.settings;
    const possible = logAddExp(found.others(row), found.sep(row)), all = logAddExp(possible, found.pad(row));
    const extended = (value, more) => ({
      ...more,
      ranking: beam.ranking + (length === this.settings.max_tag_tokens ? 0 : value - possible),
      logProb: beam.logProb + value - all,
      cell: row,
    });
    const ended = extended(found.sep(row), { tokens: beam.tokens, finished: true });
    if (length === this.settings.max_tag_tokens) return [ended];
    const longer = Array.from({ length: generation.num_beams }, (_, k) =>
      extended(found.logProbs(row, k) + found.others(row), { tokens: [...beam.tokens, found.token(row, k)] }));
    return [...longer, ended];
  }

  // Returns the hypotheses whose tags can still reach the threshold. The others keep their places in the beams.
  #dropHopeless(open, { threshold, weights, logits }) {
    if (!threshold) return open;
    const same = new Map();
    for (const { beam } of open) {
      const key = String.fromCharCode(...beam.tokens), group = same.get(key) ?? { missed: 0, likeliest: -Infinity };
      group.missed += Math.log1p(-Math.min(Math.exp(beam.logProb), 1 - 1e-7));
      group.likeliest = Math.max(group.likeliest, beam.logProb);
      same.set(key, group);
    }
    const [slotWeight, classifierWeight, bias, novelWeight, novelBias] = weights ?? [1, 0, 0, 1, 0];
    const minLogit = classifierWeight < 0 ? -Infinity : logit(Math.min(threshold, MAX_THRESHOLD)) - TOLERANCE;
    for (const [key, group] of same) {
      const largest = logit(clamp(1 - Math.exp(group.missed), MIN_SLOT_PROBABILITY, 1 - MIN_SLOT_PROBABILITY));
      const smallest = logit(MIN_SLOT_PROBABILITY);
      let best = Math.max(novelWeight * largest, novelWeight * smallest) + novelBias;
      const known = weights ? this.sorted.maxLogit(logits, key) : -Infinity;
      if (known > -Infinity) {
        best = Math.max(best, Math.max(slotWeight * largest, slotWeight * smallest) + classifierWeight * known + bias);
      }
      group.reaches = best >= minLogit;
    }
    return open.filter(({ beam }) => {
      const group = same.get(String.fromCharCode(...beam.tokens));
      const kept = group.reaches && beam.logProb >= group.likeliest + Math.log(MIN_RATIO);
      if (!kept) beam.finished = "dropped";
      return kept;
    });
  }

  // Decodes the last tokens of hypotheses, and returns the scores of their next tokens by row.
  async #decode(encoded, open, previous, position) {
    const [layers, , heads, , size] = encoded.memory_keys.dims, [, , width] = encoded.order_prompts.dims;
    const number = open.length, prompts = new Float32Array(number * width);
    open.forEach(({ slot }, row) => prompts.set(encoded.order_prompts.data.subarray(slot * width, (slot + 1) * width), row * width));
    const block = heads * position * size, shape = [layers, 1, number, heads, position, size];
    const gather = (states) => {
      const gathered = new Float32Array(layers * number * block);
      for (let layer = 0; layer < layers && position; layer++) {
        open.forEach(({ beam }, row) => {
          const start = (layer * previous.number + beam.cell) * block;
          gathered.set(states.data.subarray(start, start + block), (layer * number + row) * block);
        });
      }
      return this.#tensor("float32", gathered, shape);
    };
    const { memory_keys, memory_values, memory_mask } = encoded;
    const output = await this.#run(this.step, {
      prompts: this.#tensor("float32", prompts, [1, number, width]),
      position: this.#tensor("int64", [position], [1]),
      input_ids: this.#tensor("int64", open.map(({ beam }) => beam.tokens.at(-1)), [1, number]),
      keys: gather(previous?.keys),
      values: gather(previous?.values),
      memory_keys,
      memory_values,
      memory_mask,
    });
    const count = output.tokens.dims[2];
    return {
      number,
      keys: output.next_keys,
      values: output.next_values,
      logProbs: (row, k) => output.log_probs.data[row * count + k],
      token: (row, k) => Number(output.tokens.data[row * count + k]),
      others: (row) => output.normalizer.data[row],
      pad: (row) => output.pad_logits.data[row],
      sep: (row) => output.sep_logits.data[row],
    };
  }

  // Merges the tags of slots and classifier, each once with one probability, best first.
  #rank(slots, { threshold, weights, logits }) {
    const candidates = new Map();
    const add = (tokens) => {
      const key = String.fromCharCode(...tokens);
      if (!candidates.has(key)) candidates.set(key, { tokens, missed: 0 });
      return candidates.get(key);
    };
    for (const beams of slots) {
      for (const { tokens, logProb } of beams) {
        const probability = Math.min(Math.exp(logProb), 1);
        add(tokens).missed += probability < 1 ? Math.log1p(-probability) : -Infinity;
      }
    }
    if (logits) {
      const best = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]);
      for (const index of best.slice(0, this.settings.generation.num_candidates)) add(this.settings.classes[index]);
    }
    const tags = [], seen = new Set();
    for (const [key, { tokens, missed }] of candidates) {
      let score = -Math.expm1(missed);
      if (weights) {
        const slotLogit = logit(clamp(score, MIN_SLOT_PROBABILITY, 1 - MIN_SLOT_PROBABILITY));
        const index = this.sorted.classes.get(key), [slot, classifier, bias, novel, novelBias] = weights;
        score = sigmoid(index === undefined ? novel * slotLogit + novelBias : slot * slotLogit + classifier * logits[index] + bias);
      }
      if (Math.fround(score) >= threshold) tags.push({ label: this.tags.decode(tokens), score });
    }
    tags.sort((a, b) => b.score - a.score);
    const isNew = ({ label }) => label.trim() && !seen.has(label) && seen.add(label);
    return tags.filter(isNew).map((tag) => ({ ...tag, novel: !Object.hasOwn(this.settings.label_vocabulary, tag.label) }));
  }
}

// Decodes an image file. Transparent pixels are blended with white.
export async function readImage(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height), context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  // Nothing is drawn on a canvas that is too large.
  if (!pixels.data[3]) throw new Error(`An image of ${canvas.width} × ${canvas.height} pixels is too large.`);
  return pixels;
}
