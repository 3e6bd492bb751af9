// Command calico-client does with Calico's own client library what it is told on standard input,
// a JSON object a line, and answers each with a line: {"answer": …} or {"error": "…"}. For tests:
// tests/support/calico.py builds and caches it.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/projectcalico/calico/libcalico-go/lib/apiconfig"
	"github.com/projectcalico/calico/libcalico-go/lib/clientv3"
	"github.com/projectcalico/calico/libcalico-go/lib/ipam"
	"github.com/projectcalico/calico/libcalico-go/lib/net"
	"github.com/projectcalico/calico/libcalico-go/lib/options"
)

type request struct {
	Do         string            `json:"do"`
	Kind       string            `json:"kind"`
	Object     json.RawMessage   `json:"object"`
	Handle     string            `json:"handle"`
	Node       string            `json:"node"`
	Address    string            `json:"address"`
	Attributes map[string]string `json:"attributes"`
}

// kind is what can be done with the objects of a kind.
type kind struct {
	create func(context.Context, []byte) (any, error)
	list   func(context.Context) (any, error)
}

func of[T, L any](
	create func(context.Context, *T, options.SetOptions) (*T, error),
	list func(context.Context, options.ListOptions) (*L, error),
) kind {
	return kind{
		func(ctx context.Context, data []byte) (any, error) {
			object := new(T)
			if err := json.Unmarshal(data, object); err != nil {
				return nil, err
			}
			return create(ctx, object, options.SetOptions{})
		},
		func(ctx context.Context) (any, error) { return list(ctx, options.ListOptions{}) },
	}
}

func kinds(c clientv3.Interface) map[string]kind {
	return map[string]kind{
		"BGPConfiguration":    of(c.BGPConfigurations().Create, c.BGPConfigurations().List),
		"BGPFilter":           of(c.BGPFilter().Create, c.BGPFilter().List),
		"BGPPeer":             of(c.BGPPeers().Create, c.BGPPeers().List),
		"ClusterInformation":  of(c.ClusterInformation().Create, c.ClusterInformation().List),
		"FelixConfiguration":  of(c.FelixConfigurations().Create, c.FelixConfigurations().List),
		"GlobalNetworkPolicy": of(c.GlobalNetworkPolicies().Create, c.GlobalNetworkPolicies().List),
		"GlobalNetworkSet":    of(c.GlobalNetworkSets().Create, c.GlobalNetworkSets().List),
		"HostEndpoint":        of(c.HostEndpoints().Create, c.HostEndpoints().List),
		"IPPool":              of(c.IPPools().Create, c.IPPools().List),
		"IPReservation":       of(c.IPReservations().Create, c.IPReservations().List),
		"NetworkPolicy":       of(c.NetworkPolicies().Create, c.NetworkPolicies().List),
		"NetworkSet":          of(c.NetworkSets().Create, c.NetworkSets().List),
		"Node":                of(c.Nodes().Create, c.Nodes().List),
		"Profile":             of(c.Profiles().Create, c.Profiles().List),
		"WorkloadEndpoint":    of(c.WorkloadEndpoints().Create, c.WorkloadEndpoints().List),
		"KubeControllersConfiguration": of(
			c.KubeControllersConfiguration().Create, c.KubeControllersConfiguration().List),
	}
}

func carryOut(ctx context.Context, c clientv3.Interface, asked request) (any, error) {
	switch asked.Do {
	case "create", "list":
		known, found := kinds(c)[asked.Kind]
		if !found {
			return nil, fmt.Errorf("unknown kind %q", asked.Kind)
		}
		if asked.Do == "list" {
			return known.list(ctx)
		}
		return known.create(ctx, asked.Object)
	case "assign":
		args := ipam.AutoAssignArgs{
			Num4: 1, HandleID: &asked.Handle, Hostname: asked.Node, Attrs: asked.Attributes,
			IntendedUse: "Workload",
		}
		assigned, _, err := c.IPAM().AutoAssign(ctx, args)
		if err != nil {
			return nil, err
		}
		return assigned.IPs, nil
	case "addresses":
		return c.IPAM().IPsByHandle(ctx, asked.Handle)
	case "attributes":
		attributes, handle, err := c.IPAM().GetAssignmentAttributes(ctx, *net.ParseIP(asked.Address))
		return map[string]any{"attributes": attributes, "handle": handle}, err
	case "release":
		return nil, c.IPAM().ReleaseByHandle(ctx, asked.Handle)
	}
	return nil, fmt.Errorf("unknown request %q", asked.Do)
}

func main() {
	config := apiconfig.NewCalicoAPIConfig()
	config.Spec.DatastoreType = apiconfig.EtcdV3
	config.Spec.EtcdEndpoints = os.Args[1]
	client, err := clientv3.New(*config)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	answers := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var asked request
		var answer any
		err := json.Unmarshal(lines.Bytes(), &asked)
		if err == nil {
			answer, err = carryOut(context.Background(), client, asked)
		}
		told := map[string]any{"answer": answer}
		if err != nil {
			told = map[string]any{"error": err.Error()}
		}
		if err := answers.Encode(told); err != nil {
			os.Exit(1)
		}
	}
}
