"""Programs in six languages, shell scripts and JSON documents, from templates and drawn names."""

from __future__ import annotations

import json
import random
from string import Template
from typing import Any

ENTITIES = (
    "invoice", "sensor", "ticket", "parcel", "recipe", "account", "session", "vessel", "tenant",
    "voucher", "playlist", "meter", "booking", "sample", "turbine", "ledger", "courier", "seat",
)  # fmt: skip
FIELDS = (
    "amount", "weight", "score", "distance", "latency", "volume", "balance", "duration",
    "priority", "pressure", "altitude", "quantity", "voltage", "humidity", "discount",
)  # fmt: skip
LABELS = ("name", "label", "city", "region", "owner", "code", "status", "channel", "category")
VERBS = ("merge", "rank", "filter", "group", "validate", "archive", "reconcile", "index", "sample")
STATES = ("open", "pending", "closed", "failed", "draft", "shipped", "paused", "expired")


class Source(Template):
    """A template whose names are marked with @."""

    delimiter = "@"


PYTHON = (
    '''"""@{Verb} @{e}s by @{l}."""

from collections import defaultdict
from dataclasses import dataclass, field


@@dataclass
class @{E}:
    @{l}: str
    @{f}: float
    tags: list[str] = field(default_factory=list)

    def exceeds(self, limit: float = @{n}) -> bool:
        return self.@{f} > limit


def @{v}_by_@{l}(items: list[@{E}]) -> dict[str, float]:
    """Return the total @{f} of each @{l}, largest first."""
    totals: defaultdict[str, float] = defaultdict(float)
    for item in items:
        totals[item.@{l}] += item.@{f}
    return dict(sorted(totals.items(), key=lambda pair: -pair[1]))
''',
    """import asyncio
import logging

log = logging.getLogger(__name__)


async def fetch_@{e}(client, identifier: int, *, retries: int = @{k}):
    for attempt in range(1, retries + 1):
        try:
            response = await client.get(f"/@{e}s/{identifier}")
            response.raise_for_status()
            return response.json()["@{f}"]
        except TimeoutError:
            log.warning("@{e} %d timed out (attempt %d of %d)", identifier, attempt, retries)
            await asyncio.sleep(0.@{k} * 2**attempt)
    raise RuntimeError(f"@{e} {identifier} could not be read")


async def average_@{f}(client, identifiers):
    values = await asyncio.gather(*(fetch_@{e}(client, i) for i in identifiers))
    return sum(values) / len(values) if values else 0.0
""",
    """import pytest

from shop.@{e} import @{E}, @{v}


@@pytest.mark.parametrize(
    ("@{f}", "expected"),
    [(0, "@{s}"), (@{n}, "@{t}"), (@{m}, "@{t}")],
)
def test_@{v}_sets_the_state(@{f}: int, expected: str) -> None:
    item = @{E}(@{f}=@{f}, @{l}="north")
    assert @{v}(item).state == expected


def test_@{v}_refuses_a_negative_@{f}() -> None:
    with pytest.raises(ValueError, match="@{f} must not be negative"):
        @{v}(@{E}(@{f}=-1, @{l}="north"))
""",
)
JAVASCRIPT = (
    """// Keeps the latest @{e}s and tells listeners when their @{f} changes.
export class @{E}Store extends EventTarget {
  #items = new Map();

  upsert({ id, @{f}, @{l} }) {
    const before = this.#items.get(id);
    this.#items.set(id, { id, @{f}, @{l}, updatedAt: Date.now() });
    if (before?.@{f} !== @{f}) {
      this.dispatchEvent(new CustomEvent("change", { detail: { id, before, @{f} } }));
    }
  }

  total(@{l}) {
    let sum = 0;
    for (const item of this.#items.values()) {
      if (!@{l} || item.@{l} === @{l}) sum += item.@{f};
    }
    return sum;
  }
}
""",
    """import express from "express";
import { z } from "zod";

const schema = z.object({ @{l}: z.string().min(1), @{f}: z.number().max(@{m}) });
const router = express.Router();

router.post("/@{e}s", async (request, response, next) => {
  try {
    const body = schema.parse(request.body);
    const [row] = await request.db("@{e}s").insert(body).returning(["id", "@{f}"]);
    response.status(201).json({ ...row, state: "@{s}" });
  } catch (error) {
    if (error instanceof z.ZodError) return response.status(400).json(error.issues);
    next(error);
  }
});

export default router;
""",
    """const debounce = (callback, delay = @{n}) => {
  let timer = null;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => callback(...args), delay);
  };
};

const list = document.querySelector("#@{e}s");
document.querySelector("#search").addEventListener(
  "input",
  debounce(async ({ target }) => {
    const query = new URLSearchParams({ @{l}: target.value, limit: "@{k}" });
    const found = await fetch(`/api/@{e}s?${query}`).then((reply) => reply.json());
    list.replaceChildren(
      ...found.map(({ @{l}, @{f} }) => {
        const entry = document.createElement("li");
        entry.textContent = `${@{l}}: ${@{f}.toFixed(1)}`;
        return entry;
      }),
    );
  }),
);
""",
)
GO = (
    """package @{e}

import (
	"errors"
	"sort"
	"sync"
)

var ErrNotFound = errors.New("@{e} not found")

type @{E} struct {
	ID   int64   `json:"id"`
	@{L} string  `json:"@{l}"`
	@{F} float64 `json:"@{f}"`
}

type Store struct {
	mu    sync.RWMutex
	items map[int64]@{E}
}

func (s *Store) Get(id int64) (@{E}, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	item, ok := s.items[id]
	if !ok {
		return @{E}{}, ErrNotFound
	}
	return item, nil
}

func (s *Store) Top(n int) []@{E} {
	s.mu.RLock()
	all := make([]@{E}, 0, len(s.items))
	for _, item := range s.items {
		all = append(all, item)
	}
	s.mu.RUnlock()
	sort.Slice(all, func(i, j int) bool { return all[i].@{F} > all[j].@{F} })
	if len(all) > n {
		all = all[:n]
	}
	return all
}
""",
    """package main

import (
	"context"
	"fmt"
	"log"
	"os/signal"
	"syscall"
	"time"
)

func poll(ctx context.Context, every time.Duration, read func() (float64, error)) <-chan float64 {
	out := make(chan float64)
	go func() {
		defer close(out)
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				value, err := read()
				if err != nil {
					log.Printf("@{e}: %v", err)
					continue
				}
				out <- value
			}
		}
	}()
	return out
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	for @{f} := range poll(ctx, @{n}*time.Millisecond, read@{E}) {
		if @{f} > @{m} {
			fmt.Printf("@{f} is high: %.2f\\n", @{f})
		}
	}
}
""",
)
RUST = (
    """use std::collections::BTreeMap;

#[derive(Debug, Clone, PartialEq)]
pub struct @{E} {
    pub @{l}: String,
    pub @{f}: f64,
}

#[derive(Debug)]
pub enum ParseError {
    MissingField(&'static str),
    BadNumber(std::num::ParseFloatError),
}

impl std::str::FromStr for @{E} {
    type Err = ParseError;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let mut parts = line.split(',').map(str::trim);
        let @{l} = parts.next().ok_or(ParseError::MissingField("@{l}"))?.to_owned();
        let @{f} = parts
            .next()
            .ok_or(ParseError::MissingField("@{f}"))?
            .parse()
            .map_err(ParseError::BadNumber)?;
        Ok(@{E} { @{l}, @{f} })
    }
}

pub fn @{v}(items: &[@{E}]) -> BTreeMap<&str, f64> {
    let mut totals = BTreeMap::new();
    for item in items.iter().filter(|item| item.@{f} > @{n}.0) {
        *totals.entry(item.@{l}.as_str()).or_insert(0.0) += item.@{f};
    }
    totals
}
""",
    """/// A bounded queue of @{e}s that drops the oldest.
pub struct @{E}Queue<T> {
    items: std::collections::VecDeque<T>,
    capacity: usize,
}

impl<T> @{E}Queue<T> {
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "capacity must not be zero");
        Self { items: Default::default(), capacity }
    }

    pub fn push(&mut self, item: T) -> Option<T> {
        let dropped = (self.items.len() == self.capacity).then(|| self.items.pop_front()).flatten();
        self.items.push_back(item);
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_the_oldest() {
        let mut queue = @{E}Queue::new(@{k});
        for number in 0..@{k} {
            assert_eq!(queue.push(number), None);
        }
        assert_eq!(queue.push(@{n}), Some(0));
    }
}
""",
)
C = (
    """#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct @{e} {
    char @{l}[@{n}];
    double @{f};
    struct @{e} *next;
};

static struct @{e} *push(struct @{e} *head, const char *@{l}, double @{f})
{
    struct @{e} *node = malloc(sizeof *node);
    if (node == NULL)
        return NULL;
    snprintf(node->@{l}, sizeof node->@{l}, "%s", @{l});
    node->@{f} = @{f};
    node->next = head;
    return node;
}

int main(int argc, char **argv)
{
    struct @{e} *head = NULL;
    for (int i = 1; i + 1 < argc; i += 2) {
        char *end;
        errno = 0;
        double value = strtod(argv[i + 1], &end);
        if (errno != 0 || *end != '\\0') {
            fprintf(stderr, "%s: not a number: %s\\n", argv[0], argv[i + 1]);
            return EXIT_FAILURE;
        }
        head = push(head, argv[i], value);
    }
    for (struct @{e} *node = head; node != NULL; node = node->next)
        printf("%-@{k}s %10.3f\\n", node->@{l}, node->@{f});
    return EXIT_SUCCESS;
}
""",
    """#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CAPACITY @{n}u

typedef struct {
    uint32_t keys[CAPACITY];
    int32_t @{f}[CAPACITY];
    bool used[CAPACITY];
} @{e}_table;

static size_t slot(uint32_t key)
{
    key ^= key >> 16;
    key *= 0x7feb352du;
    return (key ^ (key >> 15)) % CAPACITY;
}

/* Returns false if the table is full. */
bool @{e}_put(@{e}_table *table, uint32_t key, int32_t value)
{
    size_t start = slot(key);
    for (size_t step = 0; step < CAPACITY; step++) {
        size_t at = (start + step) % CAPACITY;
        if (!table->used[at] || table->keys[at] == key) {
            table->keys[at] = key;
            table->@{f}[at] = value;
            table->used[at] = true;
            return true;
        }
    }
    return false;
}
""",
)
JAVA = (
    """package org.example.@{e}s;

import java.util.Comparator;
import java.util.List;
import java.util.Map;
import java.util.stream.Collectors;

public record @{E}(String @{l}, double @{f}) {

    public @{E} {
        if (@{f} < 0) {
            throw new IllegalArgumentException("@{f} must not be negative: " + @{f});
        }
    }

    public static Map<String, Double> totals(List<@{E}> items) {
        return items.stream()
                .filter(item -> item.@{f}() > @{n})
                .collect(Collectors.groupingBy(@{E}::@{l}, Collectors.summingDouble(@{E}::@{f})));
    }

    public static List<@{E}> top(List<@{E}> items, int count) {
        return items.stream()
                .sorted(Comparator.comparingDouble(@{E}::@{f}).reversed())
                .limit(count)
                .toList();
    }
}
""",
    """package org.example.service;

import java.time.Duration;
import java.util.Optional;
import java.util.concurrent.ConcurrentHashMap;

/** Caches @{e}s for a while. */
public final class @{E}Service {
    private static final Duration MAX_AGE = Duration.ofSeconds(@{n});
    private final ConcurrentHashMap<Long, Entry> cache = new ConcurrentHashMap<>();
    private final @{E}Repository repository;

    public @{E}Service(@{E}Repository repository) {
        this.repository = repository;
    }

    public Optional<Double> @{f}(long id) {
        Entry entry = cache.compute(id, (key, old) -> {
            if (old != null && !old.isOlderThan(MAX_AGE)) {
                return old;
            }
            return repository.findById(key).map(Entry::of).orElse(null);
        });
        return Optional.ofNullable(entry).map(Entry::@{f});
    }
}
""",
)
SHELL = (
    """#!/bin/sh
# Back up the @{e}s and keep the last @{k} archives.
set -eu

source_dir=${1:?usage: $0 SOURCE TARGET}
target_dir=${2:?usage: $0 SOURCE TARGET}
stamp=$(date -u +%Y%m%dT%H%M%SZ)

mkdir -p "$target_dir"
tar -czf "$target_dir/@{e}s-$stamp.tar.gz" -C "$source_dir" .
ls -1t "$target_dir"/@{e}s-*.tar.gz | tail -n +@{k} | while read -r old; do
    echo "removing $old"
    rm -- "$old"
done
""",
    """$ curl -s https://api.example.org/v1/@{e}s?@{l}=north | jq '.items[] | select(.@{f} > @{n})'
$ journalctl -u @{e}-worker --since "@{k} hours ago" | grep -c '@{s}'
$ find . -name '*.@{e}.csv' -mtime -@{k} -print0 | xargs -0 wc -l | sort -n | tail -5
$ awk -F, 'NR > 1 { sum[$2] += $3 } END { for (l in sum) print l, sum[l] }' @{e}s.csv
$ git log --oneline --since=2.weeks -- src/@{e}s | head -@{k}
$ docker compose logs --tail @{n} @{e}-api 2>&1 | grep -i error
$ for host in north south; do ssh "$host" "df -h /var/lib/@{e}s | tail -1"; done
""",
    """#!/usr/bin/env bash
# Print the @{e}s with the largest @{f}.
set -euo pipefail

usage() { echo "usage: $(basename "$0") [-n COUNT] FILE..." >&2; exit 2; }

count=@{k}
while getopts "n:h" option; do
  case $option in
    n) count=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[[ $# -gt 0 ]] || usage

trap 'rm -f "$scratch"' EXIT
scratch=$(mktemp)
for file in "$@@"; do
  if [[ ! -r $file ]]; then
    printf '%s: cannot be read\\n' "$file" >&2
    continue
  fi
  grep -v '@{s}' "$file" | cut -d';' -f2,4 >> "$scratch"
done
sort -t';' -k2,2nr "$scratch" | head -n "$count" | column -t -s';'
""",
)

LANGUAGES = {
    "python": PYTHON, "javascript": JAVASCRIPT, "go": GO, "rust": RUST, "c": C, "java": JAVA,
    "shell": SHELL,
}  # fmt: skip


def program(rng: random.Random, language: str, index: int) -> str:
    """A program from one of the language's templates, taken in turn."""
    templates = LANGUAGES[language]
    entity, number = rng.choice(ENTITIES), rng.choice((32, 40, 64, 75, 90, 120, 128, 150))
    field, label, verb = rng.choice(FIELDS), rng.choice(LABELS), rng.choice(VERBS)
    state, other = rng.sample(STATES, 2)
    return Source(templates[index % len(templates)]).substitute(
        e=entity, E=entity.capitalize(), f=field, F=field.capitalize(), l=label,
        L=label.capitalize(), v=verb, Verb=verb.capitalize(), s=state, t=other, n=number,
        m=number * rng.randint(2, 9), k=rng.randint(3, 9),
    )  # fmt: skip


def document(rng: random.Random, index: int) -> str:
    """A JSON document: records, a configuration, a schema or an event log."""
    entity, field, label = rng.choice(ENTITIES), rng.choice(FIELDS), rng.choice(LABELS)
    makers = (_records, _configuration, _schema, _events)
    value = makers[index % len(makers)](rng, entity, field, label)
    return json.dumps(value, indent=rng.choice((None, 2)), ensure_ascii=False)


def _records(rng: random.Random, entity: str, field: str, label: str) -> Any:
    return {
        f"{entity}s": [
            {
                "id": f"{entity[:3]}_{rng.getrandbits(32):08x}",
                label: rng.choice(("north", "south", "harbour", "station", "old town")),
                field: round(rng.uniform(1, 900), 2),
                "state": rng.choice(STATES),
                "tags": rng.sample(("new", "bulk", "fragile", "urgent", "internal"), 2),
                "created_at": f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}T08:30:00Z",
            }
            for _ in range(rng.randint(3, 7))
        ],
        "next": rng.choice((None, f"cursor-{rng.randint(100, 999)}")),
    }


def _configuration(rng: random.Random, entity: str, field: str, label: str) -> Any:
    return {
        "service": f"{entity}-api",
        "listen": {"host": "127.0.0.1", "port": rng.randint(3000, 9999), "tls": rng.random() < 0.5},
        "limits": {f"max_{field}": rng.randint(10, 5000), "timeout_s": rng.choice((5, 10, 30))},
        "logging": {"level": rng.choice(("debug", "info", "warning")), "fields": [label, field]},
        "features": {f"{verb}_{entity}s": rng.random() < 0.5 for verb in rng.sample(VERBS, 3)},
    }


def _schema(rng: random.Random, entity: str, field: str, label: str) -> Any:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": entity.capitalize(),
        "type": "object",
        "required": [label, field],
        "properties": {
            label: {"type": "string", "minLength": 1, "maxLength": rng.choice((40, 80, 120))},
            field: {"type": "number", "minimum": 0, "maximum": rng.randint(100, 9000)},
            "state": {"enum": rng.sample(STATES, 4)},
            "notes": {"type": ["string", "null"]},
        },
        "additionalProperties": False,
    }


def _events(rng: random.Random, entity: str, field: str, label: str) -> Any:
    clock = rng.randint(1_760_000_000, 1_790_000_000)
    events = []
    for _ in range(rng.randint(4, 8)):
        clock += rng.randint(1, 600)
        events.append({
            "ts": clock,
            "type": f"{entity}.{rng.choice(STATES)}",
            "data": {label: rng.choice("ABCDEF") + str(rng.randint(1, 99)), field: rng.random()},
        })  # fmt: skip
    return events
