package postgresql

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

type source struct {
	io.Reader
	policy string
}

func (s source) FromPolicy(context.Context, string) (string, error) { return s.policy, nil }

func TestComplete(t *testing.T) {
	pair := []string{"a", "b"}
	for name, c := range map[string]struct {
		spec kind.Spec
		says string
	}{
		"defaults":               {kind.Spec{Username: "app"}, ""},
		"no username":            {kind.Spec{}, "username"},
		"long username":          {kind.Spec{Username: strings.Repeat("ü", 32)}, "username"},
		"new line":               {kind.Spec{Username: "a\nb"}, "username"},
		"not UTF-8":              {kind.Spec{Username: "a\xffb"}, "username"},
		"NUL":                    {kind.Spec{Username: "a\x00b"}, "username"},
		"overlap":                {kind.Spec{Username: "app", Strategy: kind.Overlap}, "swap or alternate"},
		"two users":              {kind.Spec{Usernames: pair}, ""},
		"two users, and one":     {kind.Spec{Usernames: pair, Username: "app"}, "no username"},
		"two users, swapped":     {kind.Spec{Usernames: pair, Strategy: kind.Swap}, "usernames"},
		"one of two":             {kind.Spec{Usernames: pair[:1]}, "two different users"},
		"one that has no name":   {kind.Spec{Usernames: []string{"a", "b\n"}}, "usernames"},
		"alternate with one":     {kind.Spec{Username: "app", Strategy: kind.Alternate}, "usernames"},
		"short password":         {kind.Spec{Username: "app", Length: 8}, "length"},
		"long password":          {kind.Spec{Username: "app", Length: 1000}, "length"},
		"an end":                 {kind.Spec{Username: "app", ValidFor: time.Hour}, ""},
		"an end that is near":    {kind.Spec{Username: "app", ValidFor: time.Minute}, "valid_until"},
		"an end before now":      {kind.Spec{Username: "app", ValidFor: -time.Hour}, "valid_until"},
		"itself":                 {kind.Spec{Username: "app", SelfRotation: true}, ""},
		"itself, with an end":    {kind.Spec{Username: "app", SelfRotation: true, ValidFor: time.Hour}, "VALID UNTIL"},
		"itself, with two users": {kind.Spec{Usernames: pair, SelfRotation: true}, "allow_self_rotation"},
	} {
		err := Kind{}.Complete(&c.spec)
		if c.says != "" {
			require.ErrorContains(t, err, c.says, name)
			continue
		}
		require.NoError(t, err, name)
		require.Equal(t, len(c.spec.Usernames) == 2, c.spec.Strategy == kind.Alternate)
		require.Equal(t, len(c.spec.Usernames) == 0, c.spec.Strategy == kind.Swap)
		require.Equal(t, defaultLength, c.spec.Length)
	}
}

func TestPasswordsThatEveryClientSendsAlike(t *testing.T) {
	for secret, usable := range map[string]bool{
		"":                         false,
		"plain-Password_1~!@#$ %^": true,
		"Größe":                    true,
		"Gro\u0308ße":              false, // decomposed
		"soft\u00adhyphen":         false,
		"wide\uff21":               false, // SASLprep makes A of it, RFC 8265 does not
		"no\u00a0break":            false,
		"tab\there":                false,
		"line\n":                   false,
		"\xff":                     false,
		strings.Repeat("x", 996):   true,
		strings.Repeat("x", 997):   false,
	} {
		err := Kind{}.CheckInitial(kind.Spec{}, secret)
		require.Equal(t, usable, err == nil, "%q: %v", secret, err)
		_, err = Kind{}.Generate(t.Context(), kind.Spec{Role: "r", PasswordPolicy: "p"}, source{rand.Reader, secret})
		require.Equal(t, usable, err == nil, "%q: %v", secret, err)
		require.True(t, err == nil || kind.IsDefinite(err))
	}
	m, err := Kind{}.Generate(t.Context(), kind.Spec{Role: "r", Username: "app", Length: 40}, source{Reader: rand.Reader})
	require.NoError(t, err)
	require.Len(t, m.Secret, 40)
	require.Equal(t, "app", m.Username)
	require.True(t, agreed(m.Secret))
	require.Zero(t, m.Expires)
	for _, policy := range []string{"", "p"} {
		spec := kind.Spec{Role: "r", Username: "app", ValidFor: time.Hour, PasswordPolicy: policy}
		m, err = Kind{}.Generate(t.Context(), spec, source{rand.Reader, "by-the-policy"})
		require.NoError(t, err)
		require.WithinDuration(t, time.Now().Add(time.Hour), m.Expires, 10*time.Second)
	}
	_, err = Kind{}.Generate(t.Context(), kind.Spec{Role: "r"}, source{Reader: iotest.ErrReader(io.EOF)})
	require.Error(t, err)
}

// The example of RFC 7677: with its salt the keys are those that its exchange
// proves.
func TestVerifier(t *testing.T) {
	salt, err := base64.StdEncoding.DecodeString("W22ZaJ0SNY7soEsUEjb6gQ==")
	require.NoError(t, err)
	v, err := saltedVerifier("pencil", salt)
	require.NoError(t, err)
	require.Equal(t, "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=", v)
	a, err := verifierOf("pencil")
	require.NoError(t, err)
	b, err := verifierOf("pencil")
	require.NoError(t, err)
	require.NotEqual(t, a, b)
	require.Regexp(t, `^SCRAM-SHA-256\$4096:[A-Za-z0-9+/=]+\$[A-Za-z0-9+/=]+:[A-Za-z0-9+/=]+$`, a)
}

// However the bytes of a dialogue arrive, it is understood alike.
func TestDialogue(t *testing.T) {
	message := func(kind byte, body string) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)+4)), body...)
	}
	method := func(code byte, more string) []byte { return message('R', "\x00\x00\x00"+string(rune(code))+more) }
	for name, c := range map[string]struct {
		said     [][]byte
		asked    uint32
		accepted bool
	}{
		"scram":   {[][]byte{method(10, "SCRAM-SHA-256\x00\x00"), method(11, "r=abc"), method(12, "v=abc"), method(0, ""), method(3, "")}, 10, true},
		"refused": {[][]byte{method(10, "SCRAM-SHA-256\x00\x00"), method(11, "r=abc"), message('E', "SFATAL\x00\x00")}, 10, false},
		"trust":   {[][]byte{message('N', "notice"), method(0, "")}, 0, true},
		"md5":     {[][]byte{method(5, "salt"), method(0, "")}, 5, true},
		"plain":   {[][]byte{method(3, "")}, 3, false},
		"nothing": {nil, 0, false},
	} {
		said := bytes.Join(c.said, nil)
		for way, r := range map[string]io.Reader{"whole": bytes.NewReader(said), "in bytes": iotest.OneByteReader(bytes.NewReader(said)), "in halves": iotest.HalfReader(bytes.NewReader(said))} {
			d := &dialogue{r: r, budget: bounded.NewBudget(maxHeard)}
			got, err := io.ReadAll(d)
			require.NoError(t, err)
			require.Equal(t, said, append([]byte{}, got...), name)
			require.Equal(t, c.asked, d.asked, "%s %s", name, way)
			require.Equal(t, c.accepted, d.accepted, "%s %s", name, way)
		}
	}
}
