// SPDX-License-Identifier: Apache-2.0

// Package printable makes text that strangers wrote fit to be read by people and shells.
//
// What strangers write (names, protocols, banners, certificates) is read in terminals, which obey control characters
// (ECMA-48, C1 among them), and in editors and pages, which turn text around at a bidirectional mark. None of these ever
// leaves the gateway as it came.
package printable

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Text is a stranger's text as it may be shown: at most limit bytes, and what is not a letter, a mark, a number, a
// sign or a space is written as \u202e, an invalid byte as \xff. The text ends with … if it was longer.
func Text(s string, limit int) string {
	cut := len(s) > limit
	if cut {
		s = s[:limit]
		for len(s) > 0 && !utf8.RuneStart(s[len(s)-1]) { // no half of a character
			s = s[:len(s)-1]
		}
		if r, n := utf8.DecodeLastRuneInString(s); r == utf8.RuneError && n == 1 {
			s = s[:len(s)-1]
		}
	}
	if !cut && isPlain(s) {
		return s
	}
	b := Append(make([]byte, 0, len(s)+len("…")), s)
	if cut {
		b = append(b, "…"...)
	}
	return string(b)
}

// Append appends text in the same way, whatever its length. Inside the strings of JSON these escapes are JSON's
// own, so that a line of JSON stays one that says the same.
func Append[T string | []byte](dst []byte, text T) []byte {
	s := string(text)
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && n == 1:
			dst = fmt.Appendf(dst, `\x%02x`, s[0])
		case unicode.IsPrint(r):
			dst = append(dst, s[:n]...)
		default:
			for _, unit := range utf16.AppendRune(nil, r) {
				dst = fmt.Appendf(dst, `\u%04x`, unit)
			}
		}
		s = s[n:]
	}
	return dst
}

// isPlain says whether a text has nothing but printable ASCII in it, as nearly all have.
func isPlain[T string | []byte](s T) bool {
	for i := range len(s) {
		if s[i]-' ' > '~'-' ' {
			return false
		}
	}
	return true
}

// JSON is the same for a whole text of JSON, or for a line of a log: the control characters of ASCII that are in
// there are its own white space.
func JSON(text []byte) []byte {
	plain := true
	for _, b := range text {
		if b >= utf8.RuneSelf {
			plain = false
			break
		}
	}
	if plain {
		return text
	}
	out := make([]byte, 0, len(text)+len(text)/8)
	for len(text) > 0 {
		n := 0
		for n < len(text) && text[n] < utf8.RuneSelf {
			n++
		}
		out = append(out, text[:n]...)
		text = text[n:]
		for n = 0; n < len(text) && text[n] >= utf8.RuneSelf; {
			n++
		}
		out = Append(out, text[:n])
		text = text[n:]
	}
	return out
}

// Quoted is s where all of it can be seen, else s in quotes, with escapes.
func Quoted(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.QuoteToASCII(s)
	}
	return s
}

// Shell is a word that a shell takes for s, for a command that is to be copied.
func Shell(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=@%+,"
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
