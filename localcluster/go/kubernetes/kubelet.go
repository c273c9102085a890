package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/util/validation/field"
	genericapiserver "k8s.io/apiserver/pkg/server"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/component-base/cli"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/component-base/logs"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/component-base/version/verflag"
	kubeletapp "k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	"k8s.io/kubernetes/pkg/kubelet"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/apis/config/validation"
	"k8s.io/kubernetes/pkg/kubelet/eviction"
	"k8s.io/kubernetes/pkg/kubelet/kubeletconfig/configfiles"
	"k8s.io/kubernetes/pkg/util/filesystem"
	"k8s.io/kubernetes/pkg/util/oom"
	"k8s.io/mount-utils"
)

func runKubelet() { os.Exit(cli.Run(newKubeletCommand())) }

// newKubeletCommand is upstream's NewKubeletCommand, less the flags that repeat fields of the configuration file,
// and with four dependencies replaced (see unprivilegedDependencies). Upstream has no seam for the latter.
func newKubeletCommand() *cobra.Command {
	flags := options.NewKubeletFlags()
	command := &cobra.Command{
		Use:          "kubelet --config FILE --kubeconfig FILE --hostname-override NAME --node-ip IP --root-dir DIR",
		Short:        "The kubelet, without cgroups, for pods that are local processes",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE: func(command *cobra.Command, _ []string) error {
			verflag.PrintAndExitIfRequested()
			cliflag.PrintFlags(command.Flags())
			return serveKubelet(genericapiserver.SetupSignalContext(), flags)
		},
	}
	flags.AddFlags(command.Flags())
	addGlobalFlags(command.Flags())
	return command
}

func addGlobalFlags(flags *pflag.FlagSet) {
	verflag.AddFlags(flags)
	logs.AddFlags(flags)
}

func serveKubelet(ctx context.Context, flags *options.KubeletFlags) error {
	if err := options.ValidateKubeletFlags(flags); err != nil {
		return fmt.Errorf("kubelet flags: %w", err)
	}
	configuration, err := loadConfiguration(ctx, flags.KubeletConfigFile)
	if err != nil {
		return err
	}
	server := &options.KubeletServer{KubeletFlags: *flags, KubeletConfiguration: *configuration}
	dependencies, err := unprivilegedDependencies(ctx, server)
	if err != nil {
		return err
	}
	utilfeature.DefaultMutableFeatureGate.AddMetrics()
	return kubeletapp.Run(ctx, server, dependencies, utilfeature.DefaultFeatureGate)
}

// loadConfiguration reads the KubeletConfiguration and applies its feature gates and logging to this process.
func loadConfiguration(ctx context.Context, path string) (*kubeletconfig.KubeletConfiguration, error) {
	if path == "" {
		return nil, errors.New("--config is missing: name a file that holds a KubeletConfiguration")
	}
	loader, err := configfiles.NewFsLoader(&filesystem.DefaultFs{}, path)
	if err != nil {
		return nil, fmt.Errorf("kubelet configuration %s: %w", path, err)
	}
	configuration, err := loader.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("kubelet configuration %s: %w", path, err)
	}
	if configuration.EvictionHard == nil {
		configuration.EvictionHard = eviction.DefaultEvictionHard
	}
	if err := applyConfiguration(configuration); err != nil {
		return nil, fmt.Errorf("kubelet configuration %s: %w", path, err)
	}
	return configuration, nil
}

func applyConfiguration(configuration *kubeletconfig.KubeletConfiguration) error {
	gates := utilfeature.DefaultMutableFeatureGate
	if err := gates.SetFromMap(configuration.FeatureGates); err != nil {
		return err
	}
	logs.InitLogs()
	if err := logsapi.ValidateAndApplyAsField(&configuration.Logging, gates, field.NewPath("logging")); err != nil {
		return err
	}
	return validation.ValidateKubeletConfiguration(configuration, gates)
}

// unprivilegedDependencies replaces what would need root on the host:
//   - the container manager, which would write cgroups (the pods are plain processes);
//   - cAdvisor, which would read them: the machine's real size comes from the kernel instead;
//   - the OOM adjuster, because lowering one's own OOM score is forbidden in a user namespace;
//   - the mounter, by the same without systemd, which would move every mount(8) into a cgroup.
//
// Mounts themselves are real (tmpfs for Secrets, bind mounts for subPath): the root of a user namespace may make
// them in its own mount namespace, which the runtime has to share.
func unprivilegedDependencies(ctx context.Context, server *options.KubeletServer) (*kubelet.Dependencies, error) {
	dependencies, err := kubeletapp.UnsecuredDependencies(ctx, server, utilfeature.DefaultFeatureGate)
	if err != nil {
		return nil, fmt.Errorf("kubelet dependencies: %w", err)
	}
	machine := &localMachine{root: server.RootDirectory}
	dependencies.CAdvisorInterface = machine
	dependencies.ContainerManager = newContainerManager(machine)
	dependencies.OOMAdjuster = oom.NewFakeOOMAdjuster()
	dependencies.Mounter = mount.NewWithoutSystemd("")
	return dependencies, nil
}
