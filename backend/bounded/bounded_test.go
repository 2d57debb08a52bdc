package bounded

import (
	"io"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBody(t *testing.T) {
	t.Parallel()
	all := NewBudget(25)
	read := func(size int) error {
		_, err := io.ReadAll(Body(io.NopCloser(strings.NewReader(strings.Repeat("x", size))), 10, all))
		return err
	}
	require.NoError(t, read(10))
	require.ErrorIs(t, read(11), ErrTooMuch)
	require.NoError(t, read(10))
	require.ErrorIs(t, read(6), ErrTooMuch, "of all together there is not as much left")
}

func TestConn(t *testing.T) {
	t.Parallel()
	near, far := net.Pipe()
	defer func() { _ = far.Close() }()
	go func() {
		for {
			if _, err := far.Write(make([]byte, 1024)); err != nil {
				return // what has said too much is hung up on
			}
		}
	}()
	n, err := io.Copy(io.Discard, Conn(near, 10<<10))
	require.ErrorIs(t, err, ErrTooMuch)
	require.LessOrEqual(t, n, int64(10<<10))
	_, err = far.Write([]byte("x"))
	require.Error(t, err)
}

func TestLine(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"as it is, é 😀":          "as it is, é 😀",
		"\x1b[2J\x1b]0;owned\a":  "?[2J?]0;owned?",
		"one\ntwo\rthree\tfour":  "one?two?three?four",
		"\u009b31m and \x9b31m":  "?31m and ?31m",
		"harmless\u202egpj.exe":  "harmless?gpj.exe",
		"zero\u200bwidth\ufeff!": "zero?width?!",
	} {
		require.Equal(t, want, Line(text))
	}
}

func FuzzLine(f *testing.F) {
	for _, text := range []string{"", "plain", "\x1b[31m", "\x9b", "\u202e", "a\xffb", "日本語"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got := Line(text)
		for _, r := range got {
			if unprintable(r) {
				t.Fatalf("%q became %q", text, got)
			}
		}
		if Line(got) != got {
			t.Fatalf("%q became %q, which is not the end", text, got)
		}
	})
}
