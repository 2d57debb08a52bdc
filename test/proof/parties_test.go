package proof_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/hashicorp/vault/api"
	"golang.org/x/sync/errgroup"
)

// The processes that sign and verify tokens in TestNoTokenIsRefused: the test's
// own program, started once more with partyVariable set. Each holds several
// consumers of every role, and each of these knows nothing but what it read
// itself, at moments of its own, as the instances of a service do.

const partyVariable = "HARMONYFLOW_PROOF_PARTY"

// tokenAlgorithms are those of the roles; a role is called like its algorithm.
var tokenAlgorithms = []jose.SignatureAlgorithm{jose.HS256, jose.ES256, jose.RS256}

func roleOf(a jose.SignatureAlgorithm) string { return strings.ToLower(string(a)) }

// party is one process, as the test describes it to the process.
type party struct {
	Signs   bool          // or verifies
	Mount   string        // of the engine
	Refresh time.Duration // how often each consumer reads its keys
	Promise time.Duration // how old keys are at most when they are used; what the role's propagation_delay counts on
	TTL     time.Duration // the life of a token
	Pause   time.Duration // between the tokens of one consumer

	vault *api.Client
}

// handed is a token on its way from a signer to a verifier.
type handed struct {
	Algorithm jose.SignatureAlgorithm
	Token     string
	Signed    time.Time
	KeyAge    time.Duration // since the signer asked for the key that it used
}

// tally is what a verifier has to say in the end. Every token counts once.
type tally struct {
	Tokens  int
	Twice   int           // accepted at once and near the end of its life
	Refused int           // at either moment
	Late    int           // not judged: signed or checked with keys that were older than promised
	Expired int           // not judged: it had run out when it was its turn
	Oldest  time.Duration // that keys were when they signed or verified
	Reasons []string      // of the first refusals

	Keys map[jose.SignatureAlgorithm]int // that signed what was accepted twice
}

func (t *tally) add(more tally) {
	t.Tokens, t.Twice, t.Refused = t.Tokens+more.Tokens, t.Twice+more.Twice, t.Refused+more.Refused
	t.Late, t.Expired, t.Oldest = t.Late+more.Late, t.Expired+more.Expired, max(t.Oldest, more.Oldest)
	t.Reasons = append(t.Reasons, more.Reasons...)
	for algorithm, n := range more.Keys {
		t.Keys[algorithm] += n
	}
}

// runParty is main of such a process.
func runParty(description string) int {
	err := func() (err error) {
		var p party
		if err := json.Unmarshal([]byte(description), &p); err != nil {
			return err
		}
		if p.vault, err = api.NewClient(nil); err != nil { // VAULT_ADDR and VAULT_TOKEN
			return err
		}
		if p.Signs {
			return p.sign(context.Background(), os.Stdin, os.Stdout)
		}
		return p.verify(context.Background(), os.Stdin, os.Stdout)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// consumer holds the keys of a role that it read last.
type consumer struct {
	read func(context.Context) (*keys, error)
	last atomic.Pointer[keys]
}

// keys are what a consumer read: what signs, or what verifies.
type keys struct {
	asked     time.Time // when the reading began
	signer    jose.Signer
	verifying map[string]any // by kid
}

func (c *consumer) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	asked := time.Now()
	k, err := c.read(ctx)
	if err == nil {
		k.asked = asked
		c.last.Store(k)
	}
	return err
}

// keep reads the keys again and again: for the first time at a moment of its
// own, then never twice within three quarters of every.
func (c *consumer) keep(ctx context.Context, every time.Duration) error {
	for pause := rand.N(every); ctx.Err() == nil; pause = every - rand.N(every/4) {
		wait(ctx, pause)
		if err := c.refresh(ctx); err != nil && ctx.Err() == nil {
			return err // nothing here is a reason for one
		}
	}
	return nil
}

// sign signs tokens until in is closed: then whoever started it wants it to
// end, or is gone.
func (p *party) sign(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		defer stop()
		_, _ = io.Copy(io.Discard, in)
	}()
	var mu sync.Mutex
	encoder := json.NewEncoder(out)
	hand := func(h handed) error {
		mu.Lock()
		defer mu.Unlock()
		return encoder.Encode(h)
	}
	signers, ctx := errgroup.WithContext(ctx)
	for _, algorithm := range tokenAlgorithms {
		for range 2 {
			c := &consumer{read: func(ctx context.Context) (*keys, error) { return p.readSigning(ctx, algorithm) }}
			if err := c.refresh(ctx); err != nil {
				return err
			}
			signers.Go(func() error { return c.keep(ctx, p.Refresh) })
			signers.Go(func() error {
				for ctx.Err() == nil {
					h, err := c.newToken(algorithm, p.TTL)
					if err == nil {
						err = hand(h)
					}
					if err != nil {
						return err
					}
					wait(ctx, p.Pause)
				}
				return nil
			})
		}
	}
	return signers.Wait()
}

func (c *consumer) newToken(algorithm jose.SignatureAlgorithm, ttl time.Duration) (handed, error) {
	k := c.last.Load()
	now := time.Now()
	// Whole seconds, rounded down: it lives for ttl at most.
	token, err := jwt.Signed(k.signer).Claims(jwt.Claims{Subject: "somebody", Expiry: jwt.NewNumericDate(now.Add(ttl))}).Serialize()
	return handed{Algorithm: algorithm, Token: token, Signed: now, KeyAge: now.Sub(k.asked)}, err
}

// readSigning reads what a signer needs of creds/.
func (p *party) readSigning(ctx context.Context, algorithm jose.SignatureAlgorithm) (*keys, error) {
	data, err := dataOf(p.vault.Logical().ReadWithContext(ctx, p.Mount+"/creds/"+roleOf(algorithm)))
	if err != nil {
		return nil, err
	}
	var key any
	if algorithm == jose.HS256 {
		key = []byte(data["value"].(string))
	} else {
		block, _ := pem.Decode([]byte(data["private_key"].(string)))
		if block == nil {
			return nil, errors.New("private_key is not PEM")
		}
		if key, err = x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
			return nil, err
		}
	}
	// The library writes the kid of a pair by itself, and that of a shared secret
	// when it is told to.
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key},
		(&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", data["kid"]))
	return &keys{signer: signer}, err
}

// verify checks every token of in until it is closed. It says on out what it
// found when it has accepted one of each algorithm, or refused one, and again at
// the end.
func (p *party) verify(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	v := &verifier{
		party: p, consumers: map[jose.SignatureAlgorithm][]*consumer{}, say: json.NewEncoder(out),
		tally:    tally{Keys: map[jose.SignatureAlgorithm]int{}},
		accepted: map[jose.SignatureAlgorithm]bool{}, kids: map[string]bool{},
	}
	readers, ctx := errgroup.WithContext(ctx)
	for _, algorithm := range tokenAlgorithms {
		for _, read := range p.sources(algorithm) {
			c := &consumer{read: read}
			if err := c.refresh(ctx); err != nil {
				return err
			}
			v.consumers[algorithm] = append(v.consumers[algorithm], c)
			readers.Go(func() error { return c.keep(ctx, p.Refresh) })
		}
	}
	var checks sync.WaitGroup
	decoder := json.NewDecoder(in)
	for ctx.Err() == nil {
		var h handed
		err := decoder.Decode(&h)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		checks.Go(func() { v.check(ctx, h) })
	}
	checks.Wait()
	stop()
	if err := readers.Wait(); err != nil {
		return err
	}
	return v.say.Encode(v.tally)
}

// sources are the places where the verifiers of a role read its keys.
func (p *party) sources(algorithm jose.SignatureAlgorithm) []func(context.Context) (*keys, error) {
	if algorithm == jose.HS256 {
		return []func(context.Context) (*keys, error){p.readShared, p.readDocument}
	}
	jwks := func(ctx context.Context) (*keys, error) { return p.readJWKS(ctx, algorithm) }
	return []func(context.Context) (*keys, error){jwks, jwks}
}

// readShared reads the shared secrets of creds/.
func (p *party) readShared(ctx context.Context) (*keys, error) {
	data, err := dataOf(p.vault.Logical().ReadWithContext(ctx, p.Mount+"/creds/"+roleOf(jose.HS256)))
	if err != nil {
		return nil, err
	}
	k := &keys{verifying: map[string]any{}}
	for kid, secret := range data["keys"].(map[string]any) {
		k.verifying[kid] = []byte(secret.(string))
	}
	return k, nil
}

// readDocument reads them where they are published.
func (p *party) readDocument(ctx context.Context) (*keys, error) {
	secret, err := p.vault.KVv2(p.Mount).Get(ctx, tokenDocument)
	if err != nil {
		return nil, err
	}
	var byKid map[string]string
	if err := json.Unmarshal([]byte(secret.Data[tokenKeysField].(string)), &byKid); err != nil {
		return nil, err
	}
	k := &keys{verifying: map[string]any{}}
	for kid, secret := range byKid {
		k.verifying[kid] = []byte(secret)
	}
	return k, nil
}

// readJWKS reads public keys as anybody can, without a token.
func (p *party) readJWKS(ctx context.Context, algorithm jose.SignatureAlgorithm) (*keys, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.vault.Address()+"/v1/"+p.Mount+"/jwks/"+roleOf(algorithm), nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("jwks/%s: %s", roleOf(algorithm), resp.Status)
	}
	var set jose.JSONWebKeySet
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		return nil, err
	}
	k := &keys{verifying: map[string]any{}}
	for _, key := range set.Keys {
		k.verifying[key.KeyID] = key.Key
	}
	return k, nil
}

// verifier counts what becomes of tokens.
type verifier struct {
	*party
	consumers map[jose.SignatureAlgorithm][]*consumer

	mu       sync.Mutex
	tally    tally
	accepted map[jose.SignatureAlgorithm]bool
	kids     map[string]bool
	said     bool
	say      *json.Encoder
}

// verdict is what a look at a token ended with.
type verdict struct {
	kid     string
	refusal error
	late    bool
	expired bool
	keyAge  time.Duration
}

func (r verdict) good() bool { return r.refusal == nil && !r.late && !r.expired }

// check looks at a token at once and near the end of its life, each time as
// another consumer.
func (v *verifier) check(ctx context.Context, h handed) {
	both := v.consumers[h.Algorithm]
	first := rand.IntN(len(both))
	second := (first + 1) % len(both)
	result := v.look(both[first], h)
	if result.good() {
		v.accepts(h.Algorithm)
		end := h.Signed.Add(v.TTL).Truncate(time.Second)
		wait(ctx, time.Until(end)-200*time.Millisecond-rand.N(400*time.Millisecond))
		result = v.look(both[second], h)
	}
	v.count(h, result)
}

// look checks a token. A refusal counts when signer and verifier kept their
// promises and the token had not run out.
func (v *verifier) look(c *consumer, h handed) (r verdict) {
	k := c.last.Load()
	now := time.Now()
	r.keyAge = now.Sub(k.asked)
	r.late = h.KeyAge > v.Promise || r.keyAge > v.Promise
	token, err := jwt.ParseSigned(h.Token, []jose.SignatureAlgorithm{h.Algorithm})
	if err != nil {
		r.refusal = err
		return r
	}
	r.kid = token.Headers[0].KeyID
	key, ok := k.verifying[r.kid]
	if !ok {
		r.refusal = fmt.Errorf("no key %s", r.kid)
	}
	var claims jwt.Claims
	if ok {
		r.refusal = token.Claims(key, &claims)
	}
	if ok && r.refusal == nil {
		r.refusal = claims.ValidateWithLeeway(jwt.Expected{Subject: "somebody", Time: now}, 0)
	}
	r.expired = !now.Before(h.Signed.Add(v.TTL).Truncate(time.Second))
	return r
}

// accepts tells the test, once, that tokens of every algorithm are accepted.
func (v *verifier) accepts(algorithm jose.SignatureAlgorithm) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.accepted[algorithm] = true; len(v.accepted) == len(tokenAlgorithms) {
		v.sayOnce()
	}
}

func (v *verifier) sayOnce() {
	if !v.said {
		v.said = true
		_ = v.say.Encode(v.tally)
	}
}

func (v *verifier) count(h handed, r verdict) {
	v.mu.Lock()
	defer v.mu.Unlock()
	t := &v.tally
	t.Tokens++
	t.Oldest = max(t.Oldest, r.keyAge, h.KeyAge)
	switch {
	case r.late:
		t.Late++
	case r.expired:
		t.Expired++
	case r.refusal != nil:
		t.Refused++
		if len(t.Reasons) < 10 {
			t.Reasons = append(t.Reasons, fmt.Sprintf("%s: %v; signed %s ago with a key read %s before, checked with keys read %s ago", h.Algorithm, r.refusal,
				time.Since(h.Signed).Round(time.Millisecond), h.KeyAge.Round(time.Millisecond), r.keyAge.Round(time.Millisecond)))
		}
		v.sayOnce()
	default:
		t.Twice++
		if !v.kids[r.kid] {
			v.kids[r.kid] = true
			t.Keys[h.Algorithm]++
		}
	}
}
