package consumer

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// comparison is what is expected of a number: "== 0", "< 5".
type comparison struct {
	operator string
	than     float64
}

var comparisonRegexp = regexp.MustCompile(`^\s*(==|!=|<=|>=|<|>)\s*(\S+)\s*$`)

func parseComparison(expect string) (comparison, error) {
	m := comparisonRegexp.FindStringSubmatch(expect)
	if m == nil {
		return comparison{}, fmt.Errorf("expect is %.60q; of a prometheus check give a comparison, such as == 0 or < 5", expect)
	}
	than, err := strconv.ParseFloat(m[2], 64)
	if err != nil || math.IsNaN(than) {
		return comparison{}, fmt.Errorf("expect is %.60q; compare with a number, such as == 0 or < 5", expect)
	}
	return comparison{m[1], than}, nil
}

func (c comparison) holds(v float64) bool {
	switch c.operator {
	case "==":
		return v == c.than
	case "!=":
		return v != c.than && !math.IsNaN(v)
	case "<":
		return v < c.than
	case "<=":
		return v <= c.than
	case ">":
		return v > c.than
	}
	return v >= c.than
}

// checkPrometheus asks Prometheus a question, every answer of which has to be as
// expected. No answer at all is a bad one: a metric that nobody exports any more
// would pass for ever.
func (s *step) checkPrometheus(ctx context.Context, c *Check) error {
	expect, err := parseComparison(c.Expect)
	if err != nil {
		return kind.Definitely("%w", err)
	}
	values, err := s.query(ctx, c)
	if err != nil {
		return err
	}
	if len(values) == 0 {
		return badly("the query has no result; add `or vector(0)` where that is good")
	}
	for _, v := range values {
		if !expect.holds(v) {
			return badly("the query gives %g, and %s is expected", v, strings.TrimSpace(c.Expect))
		}
	}
	s.result = fmt.Sprintf("%d results, the first is %g, %s is expected", len(values), values[0], strings.TrimSpace(c.Expect))
	return nil
}

func (s *step) query(ctx context.Context, c *Check) ([]float64, error) {
	asked := *c
	asked.Method, asked.Body = http.MethodGet, ""
	resp, err := s.call(ctx, &asked, strings.TrimRight(c.URL, "/")+"/api/v1/query?query="+url.QueryEscape(c.Query))
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, badly("Prometheus answered with %d", resp.StatusCode)
	}
	values, err := parseResult(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return nil, badly("the answer of Prometheus cannot be understood; check that url leads to one")
	}
	return values, nil
}

// parseResult reads an instant vector or a scalar (prometheus.io/docs, HTTP API).
func parseResult(r io.Reader) ([]float64, error) {
	var answer struct {
		Status string `json:"status"`
		Data   struct {
			ResultType string          `json:"resultType"`
			Result     json.RawMessage `json:"result"`
		} `json:"data"`
	}
	if err := json.NewDecoder(r).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Data.ResultType == "scalar" {
		v, err := sample(answer.Data.Result)
		return []float64{v}, err
	}
	var vector []struct {
		Value json.RawMessage `json:"value"`
	}
	if answer.Status != "success" || answer.Data.ResultType != "vector" {
		return nil, fmt.Errorf("status %.20q, type %.20q", answer.Status, answer.Data.ResultType)
	}
	if err := json.Unmarshal(answer.Data.Result, &vector); err != nil {
		return nil, err
	}
	out := make([]float64, len(vector))
	for i, one := range vector {
		v, err := sample(one.Value)
		if err != nil {
			return nil, err
		}
		out[i] = v
	}
	return out, nil
}

// sample is a time and a number in quotes.
func sample(raw json.RawMessage) (float64, error) {
	var pair []any
	if err := json.Unmarshal(raw, &pair); err != nil || len(pair) != 2 {
		return 0, fmt.Errorf("it is no sample")
	}
	text, _ := pair[1].(string)
	return strconv.ParseFloat(text, 64)
}
