package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	cadvisor "github.com/google/cadvisor/info/v1"
	cadvisorv2 "github.com/google/cadvisor/info/v2"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	cadvisortest "k8s.io/kubernetes/pkg/kubelet/cadvisor/testing"
	"k8s.io/kubernetes/pkg/kubelet/cm"
)

// localMachine answers what the kubelet asks cAdvisor about the node with the figures of the real machine. What
// cAdvisor would know about cgroups (the use of each container) comes empty from the embedded fake.
type localMachine struct {
	cadvisortest.Fake
	root string // a directory on the file system that pods write to
}

// MachineInfo gives cores, memory in bytes, and identities.
func (m *localMachine) MachineInfo() (*cadvisor.MachineInfo, error) {
	var system unix.Sysinfo_t
	if err := unix.Sysinfo(&system); err != nil {
		return nil, fmt.Errorf("sysinfo: %w", err)
	}
	bootID, err := readTrimmed("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	unit := uint64(system.Unit)
	return &cadvisor.MachineInfo{
		Timestamp:      time.Now(),
		NumCores:       runtime.NumCPU(), // honours a CPU affinity mask, as taskset sets it
		MemoryCapacity: uint64(system.Totalram) * unit,
		SwapCapacity:   uint64(system.Totalswap) * unit,
		BootID:         bootID,
		MachineID:      bootID, // /etc/machine-id may be missing; nothing here outlives a boot
		SystemUUID:     bootID,
	}, nil
}

// VersionInfo gives the kernel and operating system that `kubectl get nodes -o wide` shows.
func (m *localMachine) VersionInfo() (*cadvisor.VersionInfo, error) {
	kernel, err := readTrimmed("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	return &cadvisor.VersionInfo{KernelVersion: kernel, ContainerOsVersion: osName()}, nil
}

// RootFsInfo is the file system that holds the volumes of pods.
func (m *localMachine) RootFsInfo() (cadvisorv2.FsInfo, error) { return m.GetDirFsInfo(m.root) }

// ImagesFsInfo is the same one: images are programs of the machine.
func (m *localMachine) ImagesFsInfo(context.Context) (cadvisorv2.FsInfo, error) {
	return m.GetDirFsInfo(m.root)
}

// ContainerFsInfo is the same one: containers have no writable layer.
func (m *localMachine) ContainerFsInfo(context.Context) (cadvisorv2.FsInfo, error) {
	return m.GetDirFsInfo(m.root)
}

// GetDirFsInfo gives bytes and inodes of the file system that holds path.
func (m *localMachine) GetDirFsInfo(path string) (cadvisorv2.FsInfo, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return cadvisorv2.FsInfo{}, fmt.Errorf("statfs %s: %w", path, err)
	}
	size := uint64(stat.Bsize)
	return cadvisorv2.FsInfo{
		Timestamp:  time.Now(),
		Device:     "root",
		Mountpoint: path,
		Capacity:   stat.Blocks * size,
		Available:  stat.Bavail * size,
		Usage:      (stat.Blocks - stat.Bfree) * size,
		Inodes:     &stat.Files,
		InodesFree: &stat.Ffree,
	}, nil
}

// containerManager is upstream's stub, which manages no cgroups, with the real size of the disk: the stub's
// zero would make every pod that requests ephemeral storage unschedulable.
type containerManager struct {
	cm.ContainerManager
	machine *localMachine
}

func newContainerManager(machine *localMachine) cm.ContainerManager {
	return &containerManager{ContainerManager: cm.NewStubContainerManager(), machine: machine}
}

func (c *containerManager) GetCapacity(localStorageCapacityIsolation bool) v1.ResourceList {
	disk, err := c.machine.RootFsInfo()
	if err != nil || !localStorageCapacityIsolation {
		return c.ContainerManager.GetCapacity(localStorageCapacityIsolation)
	}
	return v1.ResourceList{
		v1.ResourceEphemeralStorage: *resource.NewQuantity(int64(disk.Capacity), resource.BinarySI),
	}
}

func osName() string {
	release, err := os.ReadFile("/etc/os-release")
	if err == nil {
		for line := range strings.Lines(string(release)) {
			if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
				return strings.Trim(name, "\"\n")
			}
		}
	}
	return "Linux"
}

func readTrimmed(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(content)), nil
}
